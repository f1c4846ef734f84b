// The CUDA launcher: one grid-stride pass; 16-byte loads where every pointer and image size allows them.
#include "common/cuda.cuh"
#include "common/native.h"
#include "renoise.h"

using namespace nitro;

namespace {

template <typename T, int N>
__global__ void renoise_kernel(RenoiseParams p) {
    const int64_t packs = p.size / N;  // of one image
    const int64_t b = blockIdx.y;
    const float alpha = p.coefficients[b], sigma = p.coefficients[p.batch + b];
    const float alpha_next = p.coefficients[2 * p.batch + b], sigma_next = p.coefficients[3 * p.batch + b];
    using In = Pack<T, N>;
    using Out = Pack<float, N>;
    const In *x = static_cast<const In *>(p.x_t) + b * packs, *e = static_cast<const In *>(p.eps) + b * packs;
    const In *n = static_cast<const In *>(p.noise) + b * packs;
    Out *x0 = reinterpret_cast<Out *>(p.x0) + b * packs;
    In *y = static_cast<In *>(p.x_next) + b * packs;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * blockDim.x) {
        const In xi = x[i], ei = e[i], ni = n[i];
        Out oi;
        In yi;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float v = (to_float(xi.v[k]) - sigma * to_float(ei.v[k])) / alpha;
            oi.v[k] = v;
            yi.v[k] = from_float<T>(alpha_next * v + sigma_next * to_float(ni.v[k]));
        }
        x0[i] = oi;
        y[i] = yi;
    }
}

bool aligned(const RenoiseParams &p, int64_t pack, int64_t bytes) {
    const uintptr_t all = reinterpret_cast<uintptr_t>(p.x_t) | reinterpret_cast<uintptr_t>(p.eps) |
                          reinterpret_cast<uintptr_t>(p.noise) | reinterpret_cast<uintptr_t>(p.x_next);
    return p.size % pack == 0 && all % bytes == 0 && reinterpret_cast<uintptr_t>(p.x0) % 16 == 0;
}

template <typename T>
int run(const RenoiseParams &p, cudaStream_t stream) {
    constexpr int kPack = 4, kThreads = 256;
    const bool wide = aligned(p, kPack, kPack * sizeof(T));
    const int64_t packs = wide ? p.size / kPack : p.size;
    const int64_t blocks = (packs + kThreads - 1) / kThreads;
    cudaGetLastError();  // what another op's launch failed of, and told, is not this one's
    for (int64_t first = 0; first < p.batch; first += 65535) {  // the grid's second dimension ends there
        RenoiseParams part = p;
        const int64_t at = first * p.size, count = p.batch - first < 65535 ? p.batch - first : 65535;
        part.x_t = static_cast<const T *>(p.x_t) + at;
        part.eps = static_cast<const T *>(p.eps) + at;
        part.noise = static_cast<const T *>(p.noise) + at;
        part.x0 = p.x0 + at;
        part.x_next = static_cast<T *>(p.x_next) + at;
        part.coefficients = p.coefficients + first;
        const dim3 grid(blocks < 4096 ? blocks : 4096, count);
        if (wide) {
            renoise_kernel<T, kPack><<<grid, kThreads, 0, stream>>>(part);
        } else {
            renoise_kernel<T, 1><<<grid, kThreads, 0, stream>>>(part);
        }
    }
    return cudaGetLastError();
}

}  // namespace

int renoise_cuda(const RenoiseParams &p, void *stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (p.dtype) {
        case NITRO_F32: return run<float>(p, s);
        case NITRO_F16: return run<__half>(p, s);
        case NITRO_BF16: return run<__nv_bfloat16>(p, s);
    }
    return cudaErrorInvalidValue;
}

NITRO_CUDA_OP(renoise_cuda, RenoiseParams);
