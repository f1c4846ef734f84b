// Any processor: vectors of 4.
#include "common/float.h"
#include "common/native.h"
#include "head_pool_tasks.h"

#define VECTOR 4
#define SUMS 8
#define UNITS 2
#define UNITS_PACKED 2

namespace nitro::head_pool {
namespace {
#include "head_pool_gemm.inl"
#include "head_pool_conv.inl"
#include "head_pool_winograd.inl"
#include "head_pool_norm.inl"
#include "head_pool_kernels.inl"
}  // namespace

const Kernels kernels_base = {forward, backward, weights, features};
}  // namespace nitro::head_pool
