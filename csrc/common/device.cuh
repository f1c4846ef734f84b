// What only a GPU's compiler knows: memory sized at launch, exchanges inside a warp, single tensor-core instructions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace nitro {

// The block's dynamic shared memory. 1024: what the widest swizzle of a tensor core asks for.
template <typename T> __device__ inline T *dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
    return reinterpret_cast<T *>(dynamic_shared_bytes);
}

// The value of the lane whose number differs in the bits of `mask`; every lane of the warp takes part.
template <typename T> __device__ inline T from_lane_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// What another block may have written during this launch.
__device__ inline float load_shared_by_blocks(const float *at) { return __ldcg(at); }

// To the nearest number with ten bits after the point, which is what a tensor core reads of fp32.
__device__ inline float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// sums += a b for a warp, a [16, 8], b [8, 8]. With lane = 4 g + t: a holds (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4), b holds (t, g), (t + 4, g), sums (g, 2 t), (g, 2 t + 1) and the same of row g + 8.
__device__ inline void mma(float *sums, const float (&a)[4], const float (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace nitro
