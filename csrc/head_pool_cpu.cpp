// The CPU launchers: cut the call into tasks, choose the instruction set, run.
//
// What a task computes does not depend on the number of threads, and every number is written by one task, in one order.
#include "head_pool.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "common/native.h"
#include "head_pool_tasks.h"

namespace nitro::head_pool {
namespace {

struct Stack {
    struct Free {
        void operator()(float *p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    struct Chunk {
        std::unique_ptr<float, Free> data;
        size_t size;
    };
    std::vector<Chunk> chunks;
    size_t chunk = 0, offset = 0;

    float *take(size_t count) {
        if (chunk < chunks.size() && offset + count > chunks[chunk].size) {
            ++chunk;
            offset = 0;
        }
        if (chunk < chunks.size() && count > chunks[chunk].size) chunks.resize(chunk);  // free, and too small
        if (chunk == chunks.size()) {
            const size_t size = std::max<size_t>(count, 1 << 20);
            void *data = ::operator new(size * sizeof(float), std::align_val_t{64});
            chunks.push_back({std::unique_ptr<float, Free>(static_cast<float *>(data)), size});
        }
        float *taken = chunks[chunk].data.get() + offset;
        offset += count;
        return taken;
    }
};

Stack &stack() {
    static thread_local Stack own;
    return own;
}

const Kernels &kernels() {
    static const InstructionSet best = instruction_set();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (best == kAvx512) return kernels_avx512;
    if (best == kAvx2) return kernels_avx2;
#endif
    return kernels_base;
}

bool index_fits(const HeadPoolParams &p) {
    for (int64_t i = 0; i < p.entries * p.heads; ++i) {
        const int64_t rows = p.level[p.entry[i / p.heads].level].rows;
        if (p.index[i] < 0 || p.index[i] >= rows) return false;
    }
    return true;
}

std::vector<Block> blocks_of(const HeadPoolParams &p, int64_t entry) {
    const HeadPoolEntry &e = p.entry[entry];
    std::vector<Block> blocks;
    for (int64_t first = 0; first < p.batch; first += e.block) {
        const int64_t at = e.offset + first / e.block * e.block_size;
        blocks.push_back({&p, entry, first, smaller(e.block, p.batch - first), p.workspace + at,
                          p.scratch ? p.scratch + at : nullptr});
    }
    return blocks;
}

// A block, and a range of its heads or channels.
struct Task {
    Block block;
    int64_t begin, end;
    int64_t cost() const { return block.e().channels * block.columns(0).count() * (end - begin); }
};

// Tasks over `total` heads or channels in pieces of `piece`, the long ones first; entries nobody asked about are left out.
std::vector<Task> cut(const HeadPoolParams &p, int64_t piece, bool over_heads) {
    std::vector<Task> tasks;
    for (int64_t e = 0; e < p.entries; ++e) {
        if (p.wanted && !p.wanted[e]) continue;
        const int64_t total = over_heads ? p.heads : p.entry[e].channels;
        for (const Block &block : blocks_of(p, e))
            for (int64_t at = 0; at < total; at += piece) tasks.push_back({block, at, smaller(at + piece, total)});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task &a, const Task &b) { return a.cost() > b.cost(); });
    return tasks;
}

void run(void (*kernel)(const Block &, int64_t, int64_t), const std::vector<Task> &tasks, int threads) {
    parallel(static_cast<int64_t>(tasks.size()), threads,
             [&](int64_t i) { kernel(tasks[i].block, tasks[i].begin, tasks[i].end); });
}

std::vector<Task> cut_heads(const HeadPoolParams &p) {
    return cut(p, std::max<int64_t>(1, 256 / p.head_width), true);  // wide enough to pay for packing the map
}

// Gradients of a level's norm and logit parameters: sums of what the blocks left, entry after entry.
void small_gradients(const HeadPoolParams &p, int64_t level, int64_t layers) {
    const HeadPoolLevel &at = p.level[level];
    const int64_t width = p.head_width;
    auto out = [&](int64_t tensor) { return static_cast<float *>(p.out[tensor]); };
    float *logit_weight = out(3 * layers + level), *logit_bias = out(3 * layers + p.levels + level);
    for (int64_t l = at.first; l < at.first + at.depth; ++l)
        for (int64_t which = 1; which <= 2; ++which) std::memset(out(which * layers + l), 0, at.rows * width * 4);
    std::memset(logit_weight, 0, at.rows * width * 4);
    std::vector<double> bias(at.rows, 0.0);
    for (int64_t e = 0; e < p.entries; ++e) {
        if (p.entry[e].level != level) continue;
        for (const Block &block : blocks_of(p, e))
            for (int64_t h = 0; h < p.heads; ++h) {
                const int64_t row = block.row(h);
                auto add = [&](float *to, const float *from) {
                    for (int64_t c = 0; c < width; ++c) to[row * width + c] += from[c];
                };
                for (int64_t l = 0; l < at.depth; ++l)
                    for (int64_t which = 0; which < 2; ++which)
                        add(out((which + 1) * layers + at.first + l), block.dy + block.sum(which, l, h));
                add(logit_weight, block.dy + block.sum(2, 0, h));
                for (int64_t b = 0; b < block.images; ++b)
                    bias[row] += p.grad[(block.first_image + b) * p.entries * p.heads + e * p.heads + h];
            }
    }
    for (int64_t row = 0; row < at.rows; ++row) logit_bias[row] = static_cast<float>(bias[row]);
}

// Gradient of one layer's conv weights for some input channels, or of a row that nobody sampled, or the small ones.
struct WeightTask {
    int64_t level, layer, begin, end, row;
};

void weight_gradient(const HeadPoolParams &p, const WeightTask &t, int64_t layers) {
    if (t.layer < 0) return small_gradients(p, t.level, layers);
    float *out = static_cast<float *>(p.out[p.level[t.level].first + t.layer]);
    if (t.row >= 0) {
        const int64_t size = p.head_width * t.end * 16;
        std::memset(out + t.row * size, 0, size * sizeof(float));
        return;
    }
    std::vector<char> seen(p.level[t.level].rows, 0);
    const std::unique_ptr<bool[]> first(new bool[p.heads]);
    for (int64_t e = 0; e < p.entries; ++e) {
        if (p.entry[e].level != t.level) continue;
        const std::vector<Block> blocks = blocks_of(p, e);
        for (int64_t h = 0; h < p.heads; ++h) {
            char &was = seen[p.index[e * p.heads + h]];
            first[h] = !was;
            was = 1;
        }
        kernels().weights(blocks.data(), static_cast<int64_t>(blocks.size()), t.layer, t.begin, t.end, out, first.get());
    }
}

}  // namespace

Arena::Arena() : chunk_(stack().chunk), offset_(stack().offset) {}
Arena::~Arena() {
    stack().chunk = chunk_;
    stack().offset = offset_;
}
float *Arena::floats(int64_t count) { return stack().take(static_cast<size_t>(round_up(count + kLanes, kLanes))); }

}  // namespace nitro::head_pool

using namespace nitro::head_pool;

int head_pool_cpu(const HeadPoolParams &p, int threads) {
    if (!index_fits(p)) return 1;
    run(kernels().forward, cut_heads(p), threads);
    return 0;
}

int head_pool_rows_cpu(const HeadPoolParams &p, int threads) {
    if (!index_fits(p)) return 1;
    run(kernels().backward, cut_heads(p), threads);
    int64_t layers = 0;
    for (int64_t level = 0; level < p.levels; ++level) layers += p.level[level].depth;
    std::vector<std::vector<char>> sampled;
    for (int64_t level = 0; level < p.levels; ++level) sampled.emplace_back(p.level[level].rows, 0);
    for (int64_t i = 0; i < p.entries * p.heads; ++i) sampled[p.entry[i / p.heads].level][p.index[i]] = 1;
    std::vector<WeightTask> tasks;
    for (int64_t level = 0; level < p.levels; ++level) {
        for (int64_t layer = 0; layer < p.level[level].depth; ++layer) {
            const int64_t inputs = layer == 0 ? p.level[level].channels : p.head_width;
            const int64_t piece = inputs > 128 ? 64 : 32;  // whole 16s; the narrower the more threads
            nitro::prefer_huge_pages(p.out[p.level[level].first + layer], p.level[level].rows * p.head_width * inputs * 64);
            for (int64_t c = 0; c < inputs; c += piece)
                tasks.push_back({level, layer, c, smaller(c + piece, inputs), -1});
            for (int64_t row = 0; row < p.level[level].rows; ++row)
                if (!sampled[level][row]) tasks.push_back({level, layer, 0, inputs, row});
        }
        tasks.push_back({level, -1, 0, 0, -1});
    }
    nitro::parallel(static_cast<int64_t>(tasks.size()), threads,
                    [&](int64_t i) { weight_gradient(p, tasks[i], layers); });
    return 0;
}

int head_pool_features_cpu(const HeadPoolParams &p, int threads) {
    if (!index_fits(p)) return 1;
    run(kernels().backward, cut_heads(p), threads);
    run(kernels().features, cut(p, p.entry[0].lanes ? 32 : 128, false), threads);
    return 0;
}

NITRO_CPU_OP(head_pool_cpu, HeadPoolParams);
NITRO_CPU_OP(head_pool_rows_cpu, HeadPoolParams);
NITRO_CPU_OP(head_pool_features_cpu, HeadPoolParams);
