// What the pinned sources say about an operation, and the device that stands in for Apple's.
#pragma once

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// all that the rest of the backend, and the rules, read of it
struct ggml_metal_device {
    struct ggml_metal_device_props props;
    struct ggml_metal_fusion_info * finfo;
};

// the line of the source that gave the last answer of this thread
extern __thread int dry_line;

// whether CUDA (an H100) and Vulkan (a desktop GPU) have the operation, by their sources
bool dry_cuda_supports  (const struct ggml_tensor * op);
bool dry_vulkan_supports(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
