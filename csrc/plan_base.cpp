// Any processor: vectors of 4.
#include "common/math.h"
#include "plan.h"

#define VECTOR 4

namespace nitro::plan {
namespace {
#include "plan_kernels.inl"
#include "plan_winograd.inl"
}  // namespace

const Kernels kernels_base = {matmul, norm, map, layer_norm, keys, attention, combine, conv3, levels};
}  // namespace nitro::plan
