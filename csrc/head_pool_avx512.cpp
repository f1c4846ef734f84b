// AVX-512: 24 registers of sums, 8 x 48, 6 x 64 or 12 x 32; rows of weights as they lie go by 8 at most.
#include "common/float.h"
#include "common/native.h"
#include "head_pool_tasks.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define VECTOR 16
#define SUMS 24
#define UNITS 3
#define UNITS_PACKED 4

namespace nitro::head_pool {
namespace {
#include "head_pool_gemm.inl"
#include "head_pool_conv.inl"
#include "head_pool_winograd.inl"
#include "head_pool_norm.inl"
#include "head_pool_kernels.inl"
}  // namespace

const Kernels kernels_avx512 = {forward, backward, weights, features};
}  // namespace nitro::head_pool
#endif
