// Metal's rules, cut out of ggml-metal-device.m by build.rs.
#include "rules.h"

#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-impl.h"

__thread int dry_line;

#include "metal.inc"
