// The registry and the CPU thread pool.
#include "native.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace nitro {
namespace {

std::vector<Entry> &entries() {
    static std::vector<Entry> all;
    return all;
}

// Workers sleep between regions. A region is a task, a counter that hands out indices, and the number of workers wanted.
class Pool {
  public:
    void run(int64_t count, int workers, const std::function<void(int64_t)> &task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < workers) {
                const int id = static_cast<int>(threads_.size());
                threads_.emplace_back([this, id] { work(id); });
                threads_.back().detach();
            }
            task_ = &task;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = workers;
            busy_ = workers;
            ++generation_;
        }
        wake_.notify_all();
        drain();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void drain() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
    }

    void work(int id) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (id >= wanted_) continue;
            lock.unlock();
            drain();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t)> *task_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    int wanted_ = 0, busy_ = 0;
    uint64_t generation_ = 0;
};

std::atomic<Pool *> pool{nullptr};
std::atomic_flag in_region = ATOMIC_FLAG_INIT;

bool forked = false;

// PyTorch's OpenMP (GNU's, or another one's under its names). After an operator its threads spin for a while on every
// core, and ours would queue behind them, so a region borrows them. A forked child has lost them.
using OpenMP = void (*)(void (*run)(void *), void *argument, unsigned threads, unsigned flags);

OpenMP find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return forked ? nullptr : found;
#else
    return nullptr;
#endif
}

struct Region {
    const std::function<void(int64_t)> &task;
    int64_t count;
    int threads;
    std::atomic<int64_t> next{0};
    std::atomic<int> joined{0};

    static void run(void *region) {
        Region &r = *static_cast<Region *>(region);
        if (r.joined.fetch_add(1) >= r.threads) return;
        for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.count;) r.task(i);
    }
};

#if defined(__unix__) || defined(__APPLE__)
// From the start, as it may be PyTorch alone that has threads when the process forks.
const int watching_forks = pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr);
    in_region.clear();
    forked = true;
});
#endif

// Never destroyed: workers may outlive main.
Pool *get_pool() {
    Pool *found = pool.load();
    if (found) return found;
    found = new Pool;
    pool.store(found);
    return found;
}

}  // namespace

void add_entry(const Entry &entry) { entries().push_back(entry); }

const Entry *find_entry(const char *name) {
    for (const Entry &entry : entries())
        if (std::strcmp(entry.name, name) == 0) return &entry;
    return nullptr;
}

InstructionSet instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const char *named = std::getenv("NITROKERNELS_ISA");
    const bool base = named && std::strcmp(named, "base") == 0, avx2 = named && std::strcmp(named, "avx2") == 0;
    if (!base && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return kAvx512;
    if (!base && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kBase;
}

void prefer_huge_pages(void *data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may be refused
#else
    (void)data, (void)bytes;
#endif
}

void parallel(int64_t count, int threads, const std::function<void(int64_t)> &task) {
    const int workers = static_cast<int>(count < threads ? count : threads) - 1;
    if (workers < 1 || in_region.test_and_set(std::memory_order_acquire)) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    if (const OpenMP openmp = find_openmp()) {
        Region region{task, count, workers + 1};
        openmp(Region::run, &region, 0, 0);  // 0: as many as PyTorch; another number would make OpenMP rebuild its team
    } else {
        get_pool()->run(count, workers, task);
    }
    in_region.clear(std::memory_order_release);
}

}  // namespace nitro
