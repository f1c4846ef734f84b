// The registry and the CPU thread pool.
#include "native.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
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

// Never destroyed: workers may outlive main. A forked child has no workers, so it starts a pool of its own.
Pool *get_pool() {
    Pool *found = pool.load();
    if (found) return found;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        pool.store(nullptr);
        in_region.clear();
    });
    (void)registered;
#endif
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
    get_pool()->run(count, workers, task);
    in_region.clear(std::memory_order_release);
}

}  // namespace nitro
