// Tensor-core products of TF32 matrices in shared memory. A matrix is rows of 32 numbers along k, 128 bytes, whose
// eight 16-byte chunks are exchanged (place_of), in memory aligned to 1024 bytes.
//
// multiply<N> gives a block of 256 threads the sums over k of a [128, 32] times b [N, 32]: warp w has rows 16 w to
// 16 w + 15, and in them a thread of lane 4 g + t has sums[4 j + {0, 1}] at row g, columns 8 j + 2 t + {0, 1}, and
// sums[4 j + {2, 3}] at row g + 8. That is how wgmma and mma.sync both lay them out.
#pragma once
#include <stdint.h>

#include "common/device.cuh"

namespace nitro {

// begin_multiply(); multiply() once or more; end_multiply(). With wgmma they return early: until await_multiply() sums
// and matrices are the tensor core's. publish_matrices() comes between writing matrices and the barrier before them.

constexpr int kMatrixRow = 128;  // bytes

// Byte of chunk `chunk` of row `row`. The exchange is the tensor core's 128-byte swizzle; it also keeps eight rows'
// equal chunks in different banks.
__device__ inline int place_of(int row, int chunk) { return row * kMatrixRow + ((chunk ^ (row & 7)) << 4); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma

// The matrix descriptor: address, and 1024 bytes from eight rows to the next eight, all in 16 bytes; 128-byte swizzle.
__device__ inline uint64_t matrix_at(const void *shared) {
    const uint64_t address = __cvta_generic_to_shared(shared);
    return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define NITRO_SUMS8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
    "+f"(d[i + 7])
#define NITRO_SUMS32(d) NITRO_SUMS8(d, 0), NITRO_SUMS8(d, 8), NITRO_SUMS8(d, 16), NITRO_SUMS8(d, 24)
#define NITRO_NAMES32                                                                                             \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define NITRO_NAMES48 NITRO_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NITRO_NAMES64 NITRO_NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NITRO_WGMMA(n, names, a, b, keep)                                               \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " keep ", 0;\n"                                   \
    "wgmma.mma_async.sync.aligned.m64n" n "k8.f32.tf32.tf32 {" names "}, " a ", " b ", p, 1, 1;\n}\n"

// sums = a b, or with keep sums += a b, for the 64 rows of a warp group and eight of k; runs on after it returns.
__device__ inline void wgmma(float (&sums)[32], uint64_t a, uint64_t b, int keep) {
    asm volatile(NITRO_WGMMA("64", NITRO_NAMES32, "%32", "%33", "%34")
                 : NITRO_SUMS32(sums)
                 : "l"(a), "l"(b), "r"(keep));
}
__device__ inline void wgmma(float (&sums)[48], uint64_t a, uint64_t b, int keep) {
    asm volatile(NITRO_WGMMA("96", NITRO_NAMES48, "%48", "%49", "%50")
                 : NITRO_SUMS32(sums), NITRO_SUMS8(sums, 32), NITRO_SUMS8(sums, 40)
                 : "l"(a), "l"(b), "r"(keep));
}
__device__ inline void wgmma(float (&sums)[64], uint64_t a, uint64_t b, int keep) {
    asm volatile(NITRO_WGMMA("128", NITRO_NAMES64, "%64", "%65", "%66")
                 : NITRO_SUMS32(sums), NITRO_SUMS8(sums, 32), NITRO_SUMS8(sums, 40), NITRO_SUMS8(sums, 48),
                   NITRO_SUMS8(sums, 56)
                 : "l"(a), "l"(b), "r"(keep));
}

__device__ inline void begin_multiply() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

template <int N>
__device__ inline void multiply(float (&sums)[N / 2], const char *a, const char *b, bool keep) {
    const uint64_t rows = matrix_at(a + threadIdx.x / 128 * 64 * kMatrixRow), columns = matrix_at(b);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(sums, rows + 2 * k, columns + 2 * k, keep || k > 0);  // eight numbers: 32 bytes
}

__device__ inline void end_multiply() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int N> __device__ inline void await_multiply(float (&sums)[N / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");  // not read earlier
}

__device__ inline void publish_matrices() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

#else  // mma.sync, which any other GPU since compute capability 8.0 has

__device__ inline float number_at(const char *matrix, int row, int k) {
    return reinterpret_cast<const float *>(matrix + place_of(row, k / 4))[k % 4];
}

__device__ inline void begin_multiply() {}

template <int N>
__device__ inline void multiply(float (&sums)[N / 2], const char *a, const char *b, bool keep) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
    if (!keep) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    }
#pragma unroll 1
    for (int k = t; k < 32; k += 8) {
        const float left[4] = {number_at(a, row, k), number_at(a, row + 8, k), number_at(a, row, k + 4),
                               number_at(a, row + 8, k + 4)};
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float right[2] = {number_at(b, 8 * j + g, k), number_at(b, 8 * j + g, k + 4)};
            mma(sums + 4 * j, left, right);
        }
    }
}

__device__ inline void end_multiply() {}
template <int N> __device__ inline void await_multiply(float (&)[N / 2]) {}
__device__ inline void publish_matrices() {}

#endif

}  // namespace nitro
