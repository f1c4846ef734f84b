#include "common/math.h"
#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define VECTOR 16

namespace nitro::plan {
namespace {
#include "plan_kernels.inl"
#include "plan_winograd.inl"
}  // namespace

const Kernels kernels_avx512 = {matmul, norm, map, layer_norm, keys, attention, combine, conv3, levels};
}  // namespace nitro::plan
#endif
