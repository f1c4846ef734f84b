// What the CUDA sources share: fp32 from and to storage types, wide loads, sums over a block, launches.
#pragma once
#include <stdint.h>

#include "common/device.cuh"

namespace nitro {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ inline T from_float(float v);
template <> __device__ inline float from_float(float v) { return v; }
template <> __device__ inline __half from_float(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// N neighbours, moved by one instruction.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

// The sum over all threads of a block of at most 1024, on every one of them; always the same tree.
__device__ inline double block_sum(double value) {
    __shared__ double warps[32];
    for (int mask = 16; mask > 0; mask /= 2) value += from_lane_xor(value, mask);
    __syncthreads();  // the previous sum has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += warps[w];
    return total;
}

inline bool is_aligned(const void *pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   Params... params) {
    if (blocks < 1 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    // Beyond 48 KB a kernel has to ask. One of them is for its static memory, which counts. Never for less than another
    // thread has just asked for.
    if (shared > 47 * 1024) {
        const int most = int(shared > 96 * 1024 ? shared : 96 * 1024);
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace nitro
