// Runs a plan on the CPU. Threads claim tasks of an instruction, then wait until all of them are done. Nobody counts the
// threads, so a late one, or none but the caller, is as good as a full team.
#include "plan.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "common/native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nitro::plan {
namespace {

const Kernels &kernels() {
    static const InstructionSet best = instruction_set();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (best == kAvx512) return kernels_avx512;
    if (best == kAvx2) return kernels_avx2;
#endif
    return kernels_base;
}

void run_task(const Kernels &k, const int64_t *at, int64_t task) {
    switch (at[0]) {
        case kMatmul: return k.matmul(*reinterpret_cast<const Matmul *>(at), task);
        case kNorm: return k.norm(*reinterpret_cast<const Norm *>(at), task);
        case kMap: return k.map(*reinterpret_cast<const Map *>(at), task);
        case kLayerNorm: return k.layer_norm(*reinterpret_cast<const LayerNorm *>(at), task);
        case kKeys: return k.keys(*reinterpret_cast<const Keys *>(at), task);
        case kCombine: return k.combine(*reinterpret_cast<const Combine *>(at), task);
        case kConv3: return k.conv3(*reinterpret_cast<const Matmul *>(at), task);
        case kLevels: return k.levels(*reinterpret_cast<const Levels *>(at), task);
        case kAttention: return k.attention(*reinterpret_cast<const Attention *>(at), task);
    }
}

struct alignas(128) Progress {
    std::atomic<int64_t> next{0}, done{0};
};

// Spins for some microseconds, then lets others run: on a busy machine the thread that is waited for may not be running.
inline void wait_a_little(int &turns) {
    if (++turns > 4000) {
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

float *scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
    return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

}  // namespace nitro::plan

static int plan_cpu(const PlanParams &p, int threads) {
    using namespace nitro::plan;
    const Kernels &k = kernels();
    if (threads < 2) {
        for (int64_t i = p.first; i < p.last; ++i) {
            const int64_t *at = p.code + i * kPlanWords;
            for (int64_t task = 0; task < at[1]; ++task) run_task(k, at, task);
        }
        return 0;
    }
    const std::unique_ptr<Progress[]> progress(new Progress[p.last - p.first]);
    nitro::parallel(threads, threads, [&](int64_t) {
        for (int64_t i = p.first; i < p.last; ++i) {
            const int64_t *at = p.code + i * kPlanWords;
            Progress &mine = progress[i - p.first];
            int64_t finished = 0;
            for (int64_t task; (task = mine.next.fetch_add(1, std::memory_order_relaxed)) < at[1]; ++finished)
                run_task(k, at, task);
            if (finished) mine.done.fetch_add(finished, std::memory_order_acq_rel);
            for (int turns = 0; mine.done.load(std::memory_order_acquire) < at[1];) wait_a_little(turns);
        }
    });
    return 0;
}

NITRO_CPU_OP(plan_cpu, PlanParams);
static_assert(sizeof(nitro::plan::Matmul) <= 8 * nitro::plan::kPlanWords, "an instruction fits its words");
