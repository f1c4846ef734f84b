// The CPU launcher: every row in blocks of a fixed size; a block knows its place in the stream, so threads do not matter.
#include "refresh_rows.h"

#include <algorithm>

#include "common/float.h"
#include "common/native.h"

using namespace nitro;

namespace {

constexpr int64_t kBlock = 1 << 14;  // elements, a multiple of 4
constexpr int kRounds = 10;

inline uint64_t multiply(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

// words[4 i .. 4 i + 3] for the counters first + i, i < count. Salmon et al., SC 2011.
NITRO_CLONES void philox(uint64_t seed, uint64_t row, uint64_t first, int64_t count, uint32_t *words) {
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t at = first + i;
        uint32_t c0 = static_cast<uint32_t>(at), c1 = static_cast<uint32_t>(at >> 32);
        uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t a = multiply(0xD2511F53u, c0), b = multiply(0xCD9E8D57u, c2);
            c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(b);
            c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[4 * i] = c0;
        words[4 * i + 1] = c1;
        words[4 * i + 2] = c2;
        words[4 * i + 3] = c3;
    }
}

// The product is exact in double, so a fused multiply-add changes nothing; one rounding to double, one to float.
NITRO_CLONES void to_uniform(const uint32_t *words, int64_t count, double low, double span, float top, float *out) {
    const double scale = span * 0x1p-24;
    for (int64_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(static_cast<int32_t>(words[i] >> 8) * scale + low);
        out[i] = value < top ? value : static_cast<float>(low);
    }
}

void run_block(const RefreshRowsParams &p, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t kWords = 1024;
    uint32_t words[kWords];
    float *out = p.param + row * p.size;
    for (int64_t at = begin; at < end; at += kWords) {
        const int64_t count = std::min(kWords, end - at);
        philox(static_cast<uint64_t>(p.seed), static_cast<uint64_t>(row), static_cast<uint64_t>(at / 4), (count + 3) / 4,
               words);
        to_uniform(words, count, p.low, p.span, static_cast<float>(p.high), out + at);
    }
    for (float *moment : {p.exp_avg, p.exp_avg_sq})
        if (moment) std::fill(moment + row * p.size + begin, moment + row * p.size + end, 0.0f);
    if (p.step && begin == 0) p.step[row] = 0;
}

}  // namespace

int refresh_rows_cpu(const RefreshRowsParams &p, int threads) {
    const int64_t blocks = (p.size + kBlock - 1) / kBlock;
    const int64_t worth = std::max<int64_t>(1, (p.count * p.size) >> 15);  // a thread costs about what 32 k elements do
    nitro::parallel(p.count * blocks, static_cast<int>(std::min<int64_t>(worth, threads)), [&](int64_t k) {
        const int64_t begin = k % blocks * kBlock;
        run_block(p, p.rows[k / blocks], begin, std::min(p.size, begin + kBlock));
    });
    return 0;
}

NITRO_CPU_OP(refresh_rows_cpu, RefreshRowsParams);
