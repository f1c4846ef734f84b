// Runs a plan on the CPU. Of each instruction's tasks a thread has a part of its own, the same share of each, so that it
// finds in its cache what it wrote before. It takes what is left of the others' parts, then waits until all are done. So a
// late thread, or none but the caller, is as good as a full team.
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

struct alignas(128) Part {
    std::atomic<uint64_t> taken{0};  // an instruction's number, from 1, and the first of its tasks that nobody has begun
};

struct alignas(128) Count {
    std::atomic<int64_t> tasks{0};
};

// A task of instruction `number` that nobody has begun, of a part [first, last); -1 if there is none.
int64_t take(Part &part, uint64_t number, int64_t first, int64_t last) {
    for (uint64_t seen = part.taken.load(std::memory_order_relaxed); seen >> 32 <= number;) {
        const int64_t next = seen >> 32 == number ? static_cast<int64_t>(seen & 0xffffffffu) : first;
        if (next >= last) break;
        if (part.taken.compare_exchange_weak(seen, number << 32 | (next + 1), std::memory_order_relaxed)) return next;
    }
    return -1;
}

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
    const std::unique_ptr<Part[]> parts(new Part[threads]);
    Count done;  // of all instructions
    nitro::parallel(threads, threads, [&](int64_t mine) {
        int64_t wanted = 0;
        for (int64_t i = p.first; i < p.last; ++i) {
            const int64_t *at = p.code + i * kPlanWords, tasks = at[1], shares = tasks < threads ? tasks : threads;
            const uint64_t number = i - p.first + 1;
            wanted += tasks;
            int64_t finished = 0;
            for (int64_t other = 0; other < shares; ++other) {
                const int64_t share = (mine + other) % shares, first = tasks * share / shares, last = tasks * (share + 1) / shares;
                for (int64_t task; (task = take(parts[share], number, first, last)) >= 0; ++finished) run_task(k, at, task);
            }
            if (finished) done.tasks.fetch_add(finished, std::memory_order_acq_rel);
            for (int turns = 0; done.tasks.load(std::memory_order_acquire) < wanted;) wait_a_little(turns);
        }
    });
    return 0;
}

NITRO_CPU_OP(plan_cpu, PlanParams);
static_assert(sizeof(nitro::plan::Matmul) <= 8 * nitro::plan::kPlanWords, "an instruction fits its words");
