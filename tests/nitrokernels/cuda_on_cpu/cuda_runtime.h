// CUDA C++ on a CPU, as much of it as csrc uses: blocks one after another, the threads of a block as fibers.
// Correct, slow, and with one difference to know: shared memory of a block starts as NaNs.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <vector>

#include "common/float.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::sqrt;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {

struct Barrier {
    unsigned count = 0, generation = 0;
};
struct Fiber {
    ucontext_t context;  // only to begin with: a jump is a system call cheaper
    jmp_buf place;
    std::vector<char> stack;
    bool begun, done;
};

inline std::vector<Fiber> all;
inline jmp_buf home;
inline Barrier block_barrier, warp_barrier[32];
inline char exchanged[1024][64];  // what each thread shows the others of its warp
inline std::vector<char> dynamic;
inline const std::function<void()> *body;

inline void yield() {
    const unsigned own = threadIdx.x;
    if (_setjmp(all[own].place) == 0) _longjmp(home, 1);
    threadIdx.x = own;
}

inline void wait(Barrier &barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.count == count) {
        barrier.count = 0;
        ++barrier.generation;
    } else {
        while (barrier.generation == generation) yield();
    }
}

// Shows `mine` to the warp, hands `read` a function from lane to what that lane showed.
template <typename T, typename Read> auto exchange(const T &mine, const Read &read) {
    static_assert(sizeof(T) <= 64, "");
    Barrier &barrier = warp_barrier[threadIdx.x / 32];
    memcpy(exchanged[threadIdx.x], &mine, sizeof(T));
    wait(barrier, 32);
    const auto result = read([](unsigned lane) {
        T value;
        memcpy(&value, exchanged[threadIdx.x / 32 * 32 + lane], sizeof(T));
        return value;
    });
    wait(barrier, 32);
    return result;
}

inline void run() {
    (*body)();
    all[threadIdx.x].done = true;
    _longjmp(home, 1);
}

inline void resume(Fiber &fiber) {
    if (_setjmp(home) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

inline void run_block(const std::function<void()> &kernel) {
    body = &kernel;
    all.resize(blockDim.x);
    for (Fiber &fiber : all) {
        fiber.stack.resize(1 << 17);
        fiber.begun = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run, 0);
    }
    for (size_t left = all.size(); left > 0;) {
        left = 0;
        for (unsigned t = 0; t < all.size(); ++t) {
            if (all[t].done) continue;
            threadIdx.x = t;
            resume(all[t]);
            left += !all[t].done;
        }
    }
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::block_barrier, blockDim.x); }
inline void __threadfence() {}
inline void __trap() { abort(); }
inline int atomicAdd(int *at, int value) {
    const int before = *at;
    *at += value;
    return before;
}

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

struct __half {
    uint16_t bits = 0;
    __half() = default;
    explicit __half(float x) : bits(nitro::to_f16(x)) {}
};
struct __nv_bfloat16 {
    uint16_t bits = 0;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) : bits(nitro::to_bf16(x)) {}
};
inline float __half2float(__half x) { return nitro::from_f16(x.bits); }
inline float __bfloat162float(__nv_bfloat16 x) { return nitro::from_bf16(x.bits); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Dynamic shared memory that kernels have asked for. Others have what their static memory leaves of 48 KB, which nvcc
// rounds up to 1 KB where dynamic memory is aligned to that.
inline std::map<const void *, size_t> asked;
inline cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int most) {
    asked[kernel] = size_t(most);
    return cudaSuccess;
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Params...), Params... params) {
    if (config->blockDim.x % 32 != 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
    const auto found = asked.find(reinterpret_cast<const void *>(kernel));
    if (config->dynamicSmemBytes > (found == asked.end() ? 47 * 1024 : found->second)) return cudaErrorInvalidValue;
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    for (unsigned b = 0; b < gridDim.x; ++b) {
        blockIdx.x = b;
        fibers::dynamic.assign(config->dynamicSmemBytes + 1024, char(0xff));
        fibers::run_block([&] { kernel(params...); });
    }
    return cudaSuccess;
}
