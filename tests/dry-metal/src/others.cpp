// The rules of CUDA and Vulkan, cut out of their sources by build.rs, with what they ask their device for. A GPU of
// each is described here: an H100 by its compute capability, a desktop GPU by Vulkan's properties.
#include "rules.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-hae-attend.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace cuda {

#define GGML_CUDA_USE_CUB
#define FLASH_ATTN_AVAILABLE
#define FATTN_KQ_STRIDE 256

struct ggml_backend_cuda_device_context { int device; };
struct ggml_backend_cuda_buffer_type_context { int device; };

struct info { struct { int cc; size_t smpb; } devices[1]; };

const int GGML_CUDA_CC_VOLTA        = 700;
const int GGML_CUDA_CC_ADA_LOVELACE = 890;

static const info & ggml_cuda_info() {
    static const info res = { { { 900, 49152 } } };
    return res;
}

static bool ggml_backend_buft_is_cuda(ggml_backend_buffer_type_t) { return false; }
static bool turing_mma_available(int) { return true; }
static bool volta_mma_available(int) { return false; }
static bool amd_mfma_available(int) { return false; }
static bool amd_wmma_available(int) { return false; }
// which of its kernels, not whether there is one
static bool ggml_cuda_flash_attn_ext_mma_f16_may_use_sparse(int64_t, int64_t, int, int) { return false; }
static bool ggml_cuda_flash_attn_ext_mma_f16_shall_use_sparse(int, const ggml_tensor *, int, int) { return false; }
// of models that are not measured
static bool ggml_cuda_lightning_indexer_supported(int, const ggml_tensor *) { return false; }
// our own operations: what they need is asked where graphs are made
static bool ggml_cuda_hae_attend_supported(int, const ggml_tensor * op) {
    ggml_hae_attend_args args;
    return ggml_hae_attend_marked(op, &args) != 0;
}

#include "cuda.inc"

static bool ggml_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst) {
    return ggml_cuda_get_best_fattn_kernel(device, dst) != BEST_FATTN_KERNEL_NONE;
}

#include "cuda-ops.inc"

}

namespace vulkan {

const uint32_t num_argsort_pipelines = 11;
const uint32_t num_topk_pipelines    = 11;

struct vk_device_struct {
    bool shader_int64 = true, buffer_device_address = true, shader_64b_indexing = false;
    bool coopmat2 = false, subgroup_shuffle = true, subgroup_vote = true, subgroup_basic = true;
    bool subgroup_arithmetic = true, subgroup_require_full_support = true;
    bool vulkan_memory_model = true, fp16 = true;
    size_t max_buffer_size = size_t(4) << 30;
    uint32_t max_workgroup_size_log2 = 10, subgroup_size_log2 = 5;
    struct { struct { size_t maxStorageBufferRange = (size_t(4) << 30) - 1, maxComputeSharedMemorySize = 32768, minStorageBufferOffsetAlignment = 16; } limits; } properties;
    // pipelines: each there
    struct { bool operator[](size_t) const { return true; } } mul_mat_id_s, mul_mat_id_m, mul_mat_id_l, pipeline_topk_f32;
    void * pipeline_topk_radix_f32 = this, * pipeline_dsv4_hc_comb_f32 = this;
};
typedef vk_device_struct * vk_device;

struct ggml_backend_vk_device_context { int device; };

static vk_device ggml_vk_get_device(int) {
    static vk_device_struct res;
    return &res;
}
// of models that are not measured
static bool ggml_vk_lightning_indexer_k_type_supported(ggml_type) { return false; }
static uint64_t vk_tensor_offset(const ggml_tensor *) { return 0; }

#undef UNUSED
#define UNUSED GGML_UNUSED
#include "vulkan.inc"

}

template <typename context>
static ggml_backend_device device() {
    static context ctx = { 0 };
    ggml_backend_device res = {};
    res.context = &ctx;
    return res;
}

bool dry_cuda_supports(const ggml_tensor * op) {
    static auto dev = device<cuda::ggml_backend_cuda_device_context>();
    return cuda::ggml_backend_cuda_device_supports_op(&dev, op);
}

bool dry_vulkan_supports(const ggml_tensor * op) {
    static auto dev = device<vulkan::ggml_backend_vk_device_context>();
    return vulkan::ggml_backend_vk_device_supports_op(&dev, op);
}
