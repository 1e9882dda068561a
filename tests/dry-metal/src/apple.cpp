// Stands in for ggml-metal-device.m and ggml-metal-context.m, the backend's two files in Objective-C. Buffers are
// plain memory. Encoding a node notes which kernels would be launched; what they would compute, the CPU backend
// computes. What Metal refuses at run time is looked for: kernels that no source defines, threadgroups and their memory
// beyond the limits.
#include "rules.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-context.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "ggml-metal.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// Apple's limits of every GPU since M1 (Metal feature set tables)
static const int    MAX_THREADS   = 1024;
static const size_t MAX_TG_MEMORY = 32768;
static const size_t MAX_BYTES     = 4096; // of set_bytes

namespace {

struct kernel { const char * name; int needs; int forbids; };

const kernel KERNELS[] = {
#include "kernels.inc"
};

struct profile {
    const char * key;
    const char * name;
    ggml_metal_device_id id;
    int  family;
    bool simdgroups; // reductions and matrices
    bool bfloat;
    bool tensor;
};

// GGML_METAL_BF16_DISABLE does to an M1 what `no-bf16` says. `virtual` is the GPU that macOS gives to virtual machines,
// those of GitHub among them: what it has differs by version, this is the least that was reported
// (llama.cpp's issue 8617).
const profile PROFILES[] = {
    { "m1",      "Apple M1",                   GGML_METAL_DEVICE_M1,       7, true,  true,  false },
    { "no-bf16", "Apple M1",                   GGML_METAL_DEVICE_M1,       7, true,  false, false },
    { "m3",      "Apple M3 Max",               GGML_METAL_DEVICE_M3_MAX,   9, true,  true,  false },
    { "m5",      "Apple M5",                   GGML_METAL_DEVICE_M5,      10, true,  true,  true  },
    { "virtual", "Apple Paravirtual device",   GGML_METAL_DEVICE_GENERIC,  5, false, false, false },
};

const profile * chosen = nullptr;

// what was seen, by the node's text
struct seen {
    std::set<std::string> labels;
    std::set<std::string> kernels;
    std::map<std::string, int> answers; // the line by GPU, negative for no
    bool refused = false;
};

std::mutex mutex;
std::map<std::string, seen> nodes;
std::set<std::string> faults;
std::string label = "-";
uint64_t bytes_set, bytes_got, n_graphs, n_launches;

void fault(const std::string & text) {
    std::lock_guard<std::mutex> lock(mutex);
    if (faults.insert(text).second) {
        GGML_LOG_ERROR("dry-metal: %s\n", text.c_str());
    }
}

// contiguous: nothing; else how not
const char * layout(const ggml_tensor * t) {
    if (ggml_is_contiguous(t)) {
        return "";
    }
    if (ggml_is_transposed(t)) {
        return "^T";
    }
    if (ggml_is_permuted(t)) {
        return ggml_is_contiguous_rows(t) ? "^P" : "^PT";
    }
    return ggml_is_contiguous_rows(t) ? "^R" : "^S";
}

std::string rows(int64_t n) {
    return n == 1 ? "1" : n <= 8 ? "2-8" : "n";
}

// An operation as the table names it: its name, what tells its cases apart, and the types and layouts.
std::string text_of(const ggml_tensor * t) {
    std::string res = ggml_op_desc(t);
    switch (t->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            res += " head " + std::to_string(t->src[1]->ne[0]);
            if (t->src[1]->ne[0] != t->src[2]->ne[0]) {
                res += "/" + std::to_string(t->src[2]->ne[0]);
            }
            res += " queries " + rows(t->src[0]->ne[1]);
            break;
        case GGML_OP_MUL_MAT:
            res += std::string(ggml_get_op_params_i32(t, 1) == GGML_HINT_SRC0_IS_HADAMARD ? " hadamard" : "") + " rows " + rows(t->src[1]->ne[1]);
            break;
        case GGML_OP_MUL_MAT_ID:
            res += " rows " + rows(t->src[2]->ne[1]);
            break;
        case GGML_OP_CONCAT:
            res += " dim " + std::to_string(ggml_get_op_params_i32(t, 0));
            break;
        case GGML_OP_POOL_2D:
            res += ggml_get_op_params_i32(t, 0) == GGML_OP_POOL_MAX ? " max" : " avg";
            break;
        case GGML_OP_ROPE:
            res += " mode " + std::to_string(ggml_get_op_params_i32(t, 2)) + (t->src[2] ? " factors" : "");
            break;
        default:
            break;
    }
    res += "\t";
    for (int i = 0; i < GGML_MAX_SRC && t->src[i]; ++i) {
        res += std::string(i ? ", " : "") + ggml_type_name(t->src[i]->type) + layout(t->src[i]);
    }
    return res + " -> " + ggml_type_name(t->type) + layout(t);
}

seen & note(const ggml_tensor * t) {
    auto & s = nodes[text_of(t)];
    s.labels.insert(label);
    for (const auto & p : PROFILES) {
        ggml_metal_device dev = {};
        dev.props.has_simdgroup_mm = dev.props.has_simdgroup_reduction = p.simdgroups;
        dev.props.max_theadgroup_memory_size = MAX_TG_MEMORY;
        dev.props.has_bfloat = p.bfloat;
        dev.props.has_tensor = p.tensor;
        dry_line = 0;
        const bool yes = ggml_metal_device_supports_op(&dev, t);
        s.answers[p.key] = yes ? dry_line : -dry_line;
    }
    dry_line = 0;
    const bool cuda = dry_cuda_supports(t);
    s.answers["cuda"] = cuda ? dry_line : -dry_line;
    const bool vulkan = dry_vulkan_supports(t);
    s.answers["vulkan"] = vulkan ? dry_line : -dry_line;
    return s;
}

std::set<std::string> launched; // since the node's encoding began

bool defined(const char * name) {
    static const std::set<std::string> names = [] {
        std::set<std::string> res;
        const int has = (chosen->bfloat ? 1 : 0) | (chosen->tensor ? 2 : 0);
        for (const auto & k : KERNELS) {
            if ((k.needs & ~has) == 0 && (k.forbids & has) == 0) {
                res.insert(k.name);
            }
        }
        return res;
    }();
    return names.count(name) > 0;
}

}

//
// the device
//

struct ggml_metal_pipeline {
    std::string name;
};

struct ggml_metal_library {
    ggml_metal_device_t    dev;
    ggml_metal_pipelines_t pipelines;
};

struct ggml_metal_cv { int n; };

struct ggml_metal_encoder {
    const ggml_metal_pipeline * pipeline;
    std::map<int, size_t> memory;
};

struct ggml_metal_event { int value; };

struct ggml_metal_buffer {
    ggml_metal_device_t dev;
    char * data;
    size_t size;
    bool   owned;
    bool   shared;
};

extern "C" {

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv(); }
void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t, int32_t) { cv->n++; }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t, int32_t) { cv->n++; }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool,    int32_t) { cv->n++; }

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline(); }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }
int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return MAX_THREADS; }

ggml_metal_library_t ggml_metal_library_init(ggml_metal_device_t dev) {
    return new ggml_metal_library { dev, ggml_metal_pipelines_init() };
}
void ggml_metal_library_free(ggml_metal_library_t lib) {
    ggml_metal_pipelines_free(lib->pipelines);
    delete lib;
}
ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->dev; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    return { ggml_metal_pipelines_get(lib->pipelines, name), 0, 0, 0, 0, false, false };
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t) {
    auto res = ggml_metal_library_get_pipeline(lib, name);
    if (!res.pipeline) {
        // Metal would end the program when it is set
        if (!defined(base)) {
            fault(std::string("no kernel ") + base);
        }
        res.pipeline = ggml_metal_pipeline_init();
        res.pipeline->name = base;
        ggml_metal_pipelines_add(lib->pipelines, name, res.pipeline);
    }
    return res;
}

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder(); }
void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) { delete encoder; }
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) {}
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    encoder->pipeline = pipeline.pipeline;
    encoder->memory.clear();
    launched.insert(pipeline.pipeline->name);
}
void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void *, size_t size, int) {
    if (size > MAX_BYTES) {
        fault(encoder->pipeline->name + " is given " + std::to_string(size) + " bytes of arguments");
    }
}
void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int idx) {
    if (!buffer.metal) {
        fault((encoder->pipeline ? encoder->pipeline->name : "?") + " is given no buffer " + std::to_string(idx));
    }
}
void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int idx) {
    GGML_ASSERT(size % 16 == 0);
    encoder->memory[idx] = size;
}
void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    size_t memory = 0;
    for (const auto & m : encoder->memory) {
        memory += m.second;
    }
    const int64_t threads = (int64_t) tptg0*tptg1*tptg2;
    if (memory > MAX_TG_MEMORY) {
        fault(encoder->pipeline->name + " takes " + std::to_string(memory) + " bytes of threadgroup memory");
    }
    if (threads < 1 || threads > MAX_THREADS || tg0 < 1 || tg1 < 1 || tg2 < 1) {
        fault(encoder->pipeline->name + " is launched with " + std::to_string(threads) + " threads in " +
              std::to_string(tg0) + "x" + std::to_string(tg1) + "x" + std::to_string(tg2) + " groups");
    }
    n_launches++;
}

ggml_metal_rsets_t ggml_metal_rsets_init(ggml_metal_device_t) { return nullptr; }
void ggml_metal_rsets_free(ggml_metal_rsets_t) {}
void ggml_metal_event_encode_signal(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
void ggml_metal_event_encode_wait  (ggml_metal_event_t, ggml_metal_cmd_buf_t) {}

const char * ggml_metal_device_id_token(enum ggml_metal_device_id) { return chosen->key; }

static ggml_metal_library_t library;

ggml_metal_device_t ggml_metal_device_init(int device, int) {
    auto * dev = new ggml_metal_device();
    auto & p = dev->props;
    p.device = p.device_virt = device;
    snprintf(p.name, sizeof(p.name), "MTL%d", device);
    snprintf(p.desc, sizeof(p.desc), "%s", chosen->name);
    p.max_buffer_size            = size_t(64) << 30;
    p.max_working_set_size       = size_t(64) << 30;
    p.max_theadgroup_memory_size = MAX_TG_MEMORY;
    p.has_simdgroup_reduction    = chosen->simdgroups;
    p.has_simdgroup_mm           = chosen->simdgroups;
    p.has_unified_memory         = true;
    p.has_bfloat                 = chosen->bfloat;
    p.has_tensor                 = chosen->tensor;
    p.use_shared_buffers         = true;
    p.device_id                  = chosen->id;
    p.gpu_family                 = chosen->family;
    p.op_offload_min_batch_size  = 32;
    dev->finfo = ggml_metal_fusion_info_init(getenv("GGML_METAL_FUSION_DISABLE") == nullptr, 0);
    library = ggml_metal_library_init(dev);
    return dev;
}
void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_fusion_info_free(dev->finfo);
    ggml_metal_library_free(library);
    delete dev;
}
void * ggml_metal_device_get_obj  (ggml_metal_device_t dev) { return dev; }
void * ggml_metal_device_get_queue(ggml_metal_device_t dev) { return dev; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t) { return library; }
void ggml_metal_device_rsets_add(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_rm (ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_keep_alive(ggml_metal_device_t) {}
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return new ggml_metal_event(); }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t ev) { delete ev; }
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}
void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *free = *total = dev->props.max_working_set_size;
}
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }
ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->finfo; }

//
// buffers
//

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t dev, size_t size, bool shared) {
    // pages, as there
    void * data = nullptr;
    if (posix_memalign(&data, 16384, GGML_PAD(std::max<size_t>(size, 1), 16384)) != 0) {
        return nullptr;
    }
    return new ggml_metal_buffer { dev, (char *) data, size, true, shared };
}
ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t dev, void * ptr, size_t size, size_t) {
    return new ggml_metal_buffer { dev, (char *) ptr, size, false, true };
}
void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    if (buf->owned) {
        free(buf->data);
    }
    delete buf;
}
void * ggml_metal_buffer_get_base (ggml_metal_buffer_t buf) { return buf->data; }
bool   ggml_metal_buffer_is_shared(ggml_metal_buffer_t buf) { return buf->shared; }
void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
    std::lock_guard<std::mutex> lock(mutex);
    bytes_set += size;
}
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
    std::lock_guard<std::mutex> lock(mutex);
    bytes_got += size;
}
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    // the backend copies the bytes of contiguous tensors
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}
void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) { memset(buf->data, value, buf->size); }
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    const int64_t at = (const char *) t->data - buf->data;
    if (at >= 0 && at + (int64_t) ggml_nbytes(t) <= (int64_t) buf->size) {
        return { buf->data, (size_t) at };
    }
    return { nullptr, 0 };
}

//
// the context
//

struct ggml_metal {
    ggml_metal_device_t dev;
    ggml_backend_t      cpu;
    ggml_metal_event_t  ev_cpy;
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) {
    auto * ctx = new ggml_metal { dev, ggml_backend_cpu_init(), new ggml_metal_event() };
    ggml_backend_cpu_set_n_threads(ctx->cpu, std::clamp<int>(std::thread::hardware_concurrency(), 1, 4));
    return ctx;
}
void ggml_metal_free(ggml_metal_t ctx) {
    ggml_backend_free(ctx->cpu);
    delete ctx->ev_cpy;
    delete ctx;
}
const char * ggml_metal_get_name(ggml_metal_t ctx) { return ctx->dev->props.name; }
void ggml_metal_synchronize(ggml_metal_t) {}
void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    ggml_metal_buffer_set_tensor(nullptr, t, data, offset, size);
}
void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    ggml_metal_buffer_get_tensor(nullptr, t, data, offset, size);
}
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor * src, ggml_tensor * dst) {
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait  (ggml_metal_t, ggml_metal_event_t) {}
ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t ctx) { return ctx->ev_cpy; }
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t ctx, ggml_abort_callback callback, void * data) {
    ggml_backend_cpu_set_abort_callback(ctx->cpu, callback, data);
}
bool ggml_metal_supports_family(ggml_metal_t ctx, int family) { return family <= ctx->dev->props.gpu_family; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph * gf) { ggml_graph_optimize(gf); }

enum ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * gf) {
    {
        static std::mutex encoding;
        std::lock_guard<std::mutex> lock(encoding);
        std::vector<ggml_tensor *> at; // as the encoder numbers them
        for (int i = 0; i < gf->n_nodes; ++i) {
            if (!ggml_op_is_empty(gf->nodes[i]->op) && !ggml_is_empty(gf->nodes[i])) {
                at.push_back(gf->nodes[i]);
            }
        }
        auto * op = ggml_metal_op_init(ctx->dev, nullptr, gf, ctx->dev->finfo, 0, gf->n_nodes, true, false, 0);
        for (int idx = 0; idx < ggml_metal_op_n_nodes(op);) {
            launched.clear();
            const int n = ggml_metal_op_encode(op, idx);
            GGML_ASSERT(n > 0);
            std::lock_guard<std::mutex> lock(mutex);
            for (int i = idx; i < idx + n; ++i) {
                note(at[i]).kernels.insert(launched.begin(), launched.end());
            }
            idx += n;
        }
        ggml_metal_op_free(op);
        n_graphs++;
    }
    return ggml_backend_graph_compute(ctx->cpu, gf);
}

//
// for src/lib.rs
//

static bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);

static bool noting_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    const bool yes = supports_op(dev, op);
    if (!yes) {
        std::lock_guard<std::mutex> lock(mutex);
        note(op).refused = true;
    }
    return yes;
}

int dry_metal_register(const char * key) {
    for (const auto & p : PROFILES) {
        if (strcmp(p.key, key) == 0 && !chosen) {
            chosen = &p;
            auto * reg = ggml_backend_metal_reg();
            auto * dev = ggml_backend_reg_dev_get(reg, 0);
            supports_op = dev->iface.supports_op;
            dev->iface.supports_op = noting_supports_op;
            ggml_backend_register(reg);
            return 0;
        }
    }
    return 1;
}

void dry_metal_label(const char * text) {
    std::lock_guard<std::mutex> lock(mutex);
    label = text;
}

// bytes to and from the device, graphs, launches
void dry_metal_counts(uint64_t * out) {
    std::lock_guard<std::mutex> lock(mutex);
    const uint64_t counts[] = { bytes_set, bytes_got, n_graphs, n_launches };
    std::copy(std::begin(counts), std::end(counts), out);
}

void dry_metal_report(void (*line)(const char *, void *), void * data) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto join = [](const std::set<std::string> & set, const char * between) {
        std::string res;
        for (const auto & s : set) {
            res += (res.empty() ? "" : between) + s;
        }
        return res;
    };
    for (const auto & f : faults) {
        line(("fault\t" + f).c_str(), data);
    }
    for (const auto & [text, s] : nodes) {
        std::string answers;
        for (const auto & [key, at] : s.answers) {
            answers += (answers.empty() ? "" : " ") + key + "=" + std::to_string(at);
        }
        line(("node\t" + text + "\t" + answers + "\t" + (s.refused ? "refused" : "runs") + "\t" + join(s.kernels, " ") + "\t" + join(s.labels, ", ")).c_str(), data);
    }
}

// Registered while the program starts, before anything asks for devices: the whole test program then takes the device's
// ways.
static const bool at_start = [] {
    const char * key = getenv("DRY_METAL");
    if (key && dry_metal_register(key) != 0) {
        fprintf(stderr, "DRY_METAL=%s: no such GPU\n", key);
        exit(1);
    }
    return true;
}();

}
