// In place of csrc/common/device.cuh.
#pragma once
#include <array>

#include "cuda_runtime.h"

namespace nitro {

template <typename T> T *dynamic_shared() {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(fibers::dynamic.data()) + 1023) & ~uintptr_t(1023);
    return reinterpret_cast<T *>(base);
}

template <typename T> T from_lane_xor(T value, int mask) {
    return fibers::exchange(value, [&](auto shown) { return shown(threadIdx.x % 32 ^ mask); });
}

inline float load_shared_by_blocks(const float *at) { return *at; }

inline float to_tf32(float x) {  // to nearest, halves away from zero
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000u) & ~0x1fffu;
    memcpy(&x, &bits, 4);
    return x;
}

inline void mma(float *sums, const float (&a)[4], const float (&b)[2]) {
    const std::array<float, 6> mine = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto added = fibers::exchange(mine, [&](auto shown) {
        std::array<float, 4> out;
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned lower = i / 2, column = 2 * t + i % 2;
            float sum = 0;
            for (unsigned k = 0; k < 8; ++k)
                sum += to_tf32(shown(4 * g + k % 4)[k / 4 * 2 + lower]) * to_tf32(shown(4 * column + k % 4)[4 + k / 4]);
            out[i] = sum;
        }
        return out;
    });
    for (unsigned i = 0; i < 4; ++i) sums[i] += added[i];
}

}  // namespace nitro
