// AVX2 and FMA: 4 x 24 accumulators in 12 registers.
#include "common/float.h"
#include "common/native.h"
#include "head_pool_tasks.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define VECTOR 8
#define ROWS 4
#define UNITS 3

namespace nitro::head_pool {
namespace {
#include "head_pool_gemm.inl"
#include "head_pool_conv.inl"
#include "head_pool_norm.inl"
#include "head_pool_kernels.inl"
}  // namespace

const Kernels kernels_avx2 = {forward, backward, weights, features};
}  // namespace nitro::head_pool
#endif
