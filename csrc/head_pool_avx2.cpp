// AVX2 and FMA: 12 registers of sums, 4 x 24 or 6 x 16.
#include "common/float.h"
#include "common/native.h"
#include "head_pool_tasks.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define VECTOR 8
#define SUMS 12
#define UNITS 3
#define UNITS_PACKED 3

namespace nitro::head_pool {
namespace {
#include "head_pool_gemm.inl"
#include "head_pool_conv.inl"
#include "head_pool_winograd.inl"
#include "head_pool_norm.inl"
#include "head_pool_kernels.inl"
}  // namespace

const Kernels kernels_avx2 = {forward, backward, weights, features};
}  // namespace nitro::head_pool
#endif
