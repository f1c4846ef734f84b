// Included once per instruction set, inside an unnamed namespace. VECTOR floats in a vector; ROWS_OF(V) rows of V vectors
// are summed in registers.

#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef float vec_at __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

inline vec load(const float *p) { return *reinterpret_cast<const vec_at *>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec_at *>(p) = v; }
inline vec splat(float f) { return f - vec{}; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kMostRows = 12;      // of a tile in registers
constexpr int64_t kRun = 128;          // products that are added up in a row, give or take a tap

// out[r][v] (+)= sum over taps and channels of a[r][tap + channel] * b[.][v]; `b_step` floats between channels.
template <int R, int V>
inline void tile(const float *const *rows, const int64_t *taps, int64_t count, int64_t channels, const float *b,
                 int64_t b_step, float *out, int64_t out_step, bool add) {
    vec sum[R][V] = {};
    for (int64_t t = 0; t < count; ++t) {
        const float *a[R];
        UNROLL for (int r = 0; r < R; ++r) a[r] = rows[r] + taps[t];
        for (int64_t c = 0; c < channels; ++c, b += b_step) {
            vec w[V];
            UNROLL for (int v = 0; v < V; ++v) w[v] = load(b + v * VECTOR);
            UNROLL for (int r = 0; r < R; ++r) {
                const vec x = splat(a[r][c]);
                UNROLL for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < V; ++v) {
            float *to = out + r * out_step + v * VECTOR;
            store(to, add ? load(to) + sum[r][v] : sum[r][v]);
        }
}

// `count` rows against a panel of 16 * units columns. Rows beyond the last of `rows` repeat it.
template <int R, int V>
void panel(const float *const *rows, int64_t count, const int64_t *taps, int64_t tap_count, int64_t channels,
           const float *b, int64_t b_step, float *out, int64_t out_step, bool add) {
    int64_t r = 0;
    for (; count - r > R / 2; r += R)
        tile<R, V>(rows + r, taps, tap_count, channels, b, b_step, out + r * out_step, out_step, add);
    if (r < count) tile<R / 2, V>(rows + r, taps, tap_count, channels, b, b_step, out + r * out_step, out_step, add);
}

using Panel = void (*)(const float *const *, int64_t, const int64_t *, int64_t, int64_t, const float *, int64_t, float *,
                       int64_t, bool);

#if VECTOR == 16
const Panel kPanels[5] = {nullptr, panel<12, 1>, panel<12, 2>, panel<8, 3>, panel<6, 4>};
#endif

void multiply(const float *const *rows, int64_t count, const int64_t *taps, int64_t tap_count, int64_t channels,
              const float *b, int64_t b_step, int64_t units, float *out, int64_t out_step, bool add) {
    // Sums of runs are added up, not products: rounding grows with the length of what is added.
    const int64_t together = channels < kRun ? kRun / channels : 1, deep = smaller(channels, kRun);
    for (int64_t t = 0; t < tap_count; t += together)
        for (int64_t c = 0; c < channels; c += deep, add = true) {
            const int64_t here = smaller(together, tap_count - t), depth = smaller(deep, channels - c);
            const float *weights = b + (t * channels + c) * b_step;
            int64_t moved[9];
            for (int64_t i = 0; i < here; ++i) moved[i] = taps[t + i] + c;
#if VECTOR == 16
            kPanels[units](rows, count, moved, here, depth, weights, b_step, out, out_step, add);
#else
            for (int64_t u = 0; u < units; ++u)
                panel<VECTOR == 8 ? 6 : 2, 16 / VECTOR>(rows, count, moved, here, depth, weights + 16 * u, b_step,
                                                        out + 16 * u, out_step, add);
#endif
        }
}

inline float gelu(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678f)); }
inline float silu(float x) { return x / one_plus_exp_minus(x); }

inline void activate(float *x, int64_t count, int64_t activation) {
    switch (activation) {
        case kSilu: for (int64_t i = 0; i < count; ++i) x[i] = silu(x[i]); break;
        case kGelu: for (int64_t i = 0; i < count; ++i) x[i] = gelu(x[i]); break;
        case kQuickGelu: for (int64_t i = 0; i < count; ++i) x[i] = x[i] / one_plus_exp_minus(1.702f * x[i]); break;
        case kRelu: for (int64_t i = 0; i < count; ++i) x[i] = x[i] > 0 ? x[i] : 0; break;
    }
}

// The tail of a product: a row of sums of one panel, which it changes, becomes that part of the output's row.
void store_row(const Matmul &p, int64_t which, int64_t row, float *sum) {
    const bool gated = p.activation == kGeglu;
    const int64_t width = 16 * p.units, out_width = gated ? width / 2 : width, column = which * out_width;
    const int64_t valid = smaller(out_width, p.columns - column);
    alignas(64) static const float nothing[64] = {};
    const float *bias = p.bias ? p.bias + which * width : nothing;
    const float *residual = p.residual ? p.residual + row * p.residual_step + column : nothing;
    float *c = p.c + row * p.c_step + column;
    if (p.activation == kNone) {
        for (int64_t i = 0; i < valid; ++i) c[i] = sum[i] + bias[i] + residual[i];
        return;
    }
    for (int64_t i = 0; i < width; ++i) sum[i] += bias[i];
    if (gated)
        for (int64_t i = 0; i < out_width; ++i) sum[i] *= gelu(sum[out_width + i]);
    else
        activate(sum, width, p.activation);
    for (int64_t i = 0; i < valid; ++i) c[i] = sum[i] + residual[i];
}

void matmul(const Matmul &p, int64_t task) {
    const int64_t blocks = (p.rows + p.row_block - 1) / p.row_block, width = 16 * p.units, taps = p.kernel * p.kernel;
    // Tasks that follow each other have the same rows, if all weights fit a cache, or else the same weights.
    const bool same_rows = taps * p.channels * width * p.panels <= 1 << 16;
    const int64_t which = same_rows ? task % p.panels : task / blocks;
    const int64_t from = (same_rows ? task / p.panels : task % blocks) * p.row_block;
    const int64_t count = smaller(p.row_block, p.rows - from);
    float *sums = scratch((p.row_block + kMostRows) * width);
    const float *rows[128 + kMostRows];
    for (int64_t r = 0; r < count; ++r) rows[r] = p.a + (from + r) / p.line * p.y_step + (from + r) % p.line * p.x_step;
    for (int64_t r = count; r < count + kMostRows; ++r) rows[r] = rows[count - 1];
    int64_t tap[9];
    for (int64_t t = 0; t < taps; ++t) tap[t] = t / p.kernel * p.y_tap + t % p.kernel * p.x_tap;

    const float *b = p.b + which * taps * p.channels * width;
    multiply(rows, count, tap, taps, p.channels, b, width, p.units, sums, width, false);
    for (int64_t r = 0; r < count; ++r) store_row(p, which, from + r, sums + r * width);
}

// sum[c] = sum over rows of x[row, c], or of its squared distance from mean[c]; whole vectors, so for some more c too.
template <bool Squares>
void sum_rows(const float *x, int64_t step, int64_t rows, int64_t count, const float *mean, float *sum) {
    for (int64_t c = 0; c < count; c += VECTOR) {
        const vec center = Squares ? load(mean + c) : vec{};
        vec even = {}, odd = {};  // an addition waits for the one before
        for (int64_t r = 0; r < rows; ++r) {
            const vec d = load(x + r * step + c) - center;
            (r % 2 ? odd : even) += Squares ? d * d : d;
        }
        store(sum + c, even + odd);
    }
}

// A task is a run of whole groups, so that every sum belongs to one task. Sums of 64 rows are added in double.
void norm(const Norm &p, int64_t task) {
    const int64_t size = p.channels / p.groups, first = p.groups * task / p.tasks, last = p.groups * (task + 1) / p.tasks;
    const int64_t from = first * size, count = (last - first) * size;
    const int64_t room = (count + 15) / 16 * 16;
    float *sum = scratch(2 * room + 2 * (last - first)), *mean = sum + room;
    double *total = reinterpret_cast<double *>(mean + room);
    auto reduce = [&](auto sums) {
        for (int64_t g = 0; g < last - first; ++g) total[g] = 0;
        for (int64_t begin = 0; begin < p.rows; begin += 64) {
            sums(p.x + begin * p.x_step + from, p.x_step, smaller(64, p.rows - begin), count, mean, sum);
            for (int64_t g = 0; g < last - first; ++g)
                for (int64_t c = g * size; c < (g + 1) * size; ++c) total[g] += sum[c];
        }
        for (int64_t g = 0; g < last - first; ++g) total[g] /= static_cast<double>(p.rows * size);
    };
    reduce(sum_rows<false>);
    for (int64_t g = 0; g < last - first; ++g)
        for (int64_t c = g * size; c < (g + 1) * size; ++c) mean[c] = static_cast<float>(total[g]);
    reduce(sum_rows<true>);
    for (int64_t g = 0; g < last - first; ++g) {
        const float deviation = static_cast<float>(1 / __builtin_sqrt(total[g] + p.eps));
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
            const float scale = p.weight[from + c] * deviation;
            p.scale[from + c] = scale;
            p.shift[from + c] = p.bias[from + c] - mean[c] * scale;
        }
    }
}

inline void zero(float *p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

void map(const Map &p, int64_t task) {
    const int64_t first = p.height * task / p.tasks, last = p.height * (task + 1) / p.tasks, channels = p.channels;
    const int64_t width = (p.width + p.zoom - 1) / p.zoom;  // of the input
    if (p.border && first == 0) zero(p.out - p.out_y - p.out_x, (p.width + 2) * p.out_x);
    if (p.border && last == p.height) zero(p.out + last * p.out_y - p.out_x, (p.width + 2) * p.out_x);
    for (int64_t y = first; y < last; ++y) {
        float *line = p.out + y * p.out_y;
        if (p.border) zero(line - p.out_x, channels), zero(line + p.width * p.out_x, channels);
        for (int64_t x = 0; x < p.width; ++x) {
            const float *in = p.x + (y / p.zoom * width + x / p.zoom) * p.x_step;
            float *out = line + x * p.out_x;
            if (!p.scale) {
                __builtin_memcpy(out, in, channels * sizeof(float));
                activate(out, channels, p.activation);
            } else if (p.activation == kSilu) {
                for (int64_t c = 0; c < channels; ++c) out[c] = silu(in[c] * p.scale[c] + p.shift[c]);
            } else {
                for (int64_t c = 0; c < channels; ++c) out[c] = in[c] * p.scale[c] + p.shift[c];
            }
        }
    }
}

void layer_norm(const LayerNorm &p, int64_t task) {
    const int64_t first = p.rows * task / p.tasks, last = p.rows * (task + 1) / p.tasks, channels = p.channels;
    for (int64_t r = first; r < last; ++r) {
        const float *x = p.x + r * p.x_step;
        float *out = p.out + r * p.out_step;
        float lanes[16] = {};
        int64_t c = 0;
        for (; c + 16 <= channels; c += 16)
            for (int i = 0; i < 16; ++i) lanes[i] += x[c + i];
        double sum = 0;
        for (int i = 0; i < 16; ++i) sum += lanes[i], lanes[i] = 0;
        for (int64_t rest = c; rest < channels; ++rest) sum += x[rest];
        const float mean = static_cast<float>(sum / channels);
        for (c = 0; c + 16 <= channels; c += 16)
            for (int i = 0; i < 16; ++i) lanes[i] += (x[c + i] - mean) * (x[c + i] - mean);
        sum = 0;
        for (int i = 0; i < 16; ++i) sum += lanes[i];
        for (; c < channels; ++c) sum += static_cast<double>(x[c] - mean) * (x[c] - mean);
        const float deviation = static_cast<float>(1.0 / __builtin_sqrt(sum / channels + p.eps));
        for (c = 0; c < channels; ++c) out[c] = (x[c] - mean) * deviation * p.weight[c] + p.bias[c];
    }
}

void keys(const Keys &p, int64_t head) {
    const int64_t panels = (p.keys + 63) / 64, padded = (p.dim + 15) / 16 * 16;
    const float *k = p.k + head * p.dim, *v = p.v + head * p.dim;
    float *to_k = p.packed_k + head * panels * p.dim * 64, *to_v = p.packed_v + head * p.keys * padded;
    zero(to_k + (panels - 1) * p.dim * 64, p.dim * 64);
    for (int64_t key = 0; key < p.keys; ++key) {
        float *at = to_k + key / 64 * p.dim * 64 + key % 64;
        for (int64_t d = 0; d < p.dim; ++d) at[d * 64] = k[key * p.k_step + d];
        for (int64_t d = 0; d < p.dim; ++d) to_v[key * padded + d] = v[key * p.v_step + d];
        for (int64_t d = p.dim; d < padded; ++d) to_v[key * padded + d] = 0;
    }
}

void attention(const Attention &p, int64_t task) {
    const int64_t head = task % p.heads, from = task / p.heads * p.row_block, count = smaller(p.row_block, p.rows - from);
    const int64_t panels = (p.keys + 63) / 64, padded = (p.dim + 15) / 16 * 16, step = panels * 64;
    float *scores = scratch((p.row_block + kMostRows) * (step + padded)), *sums = scores + (p.row_block + kMostRows) * step;
    const float *rows[64 + kMostRows];
    const int64_t none = 0;
    for (int64_t r = 0; r < count + kMostRows; ++r)
        rows[r] = p.q + (from + smaller(r, count - 1)) * p.q_step + head * p.dim;
    const float *k = p.packed_k + head * panels * p.dim * 64;
    for (int64_t i = 0; i < panels; ++i) {
        const int64_t units = smaller(4, (p.keys - 64 * i + 15) / 16);
        multiply(rows, count, &none, 1, p.dim, k + i * p.dim * 64, 64, units, scores + 64 * i, step, false);
    }
    float total[64];
    const float scale = static_cast<float>(p.scale);
    for (int64_t r = 0; r < count; ++r) {
        float *s = scores + r * step, highest = s[0], lanes[16];
        const int64_t seen = p.causal ? from + r + 1 : p.keys;
        for (int64_t j = seen; j < step; ++j) s[j] = -1e30f;  // unseen keys weigh exp(-87), which is nothing
        for (int i = 0; i < 16; ++i) lanes[i] = s[i];
        for (int64_t j = 16; j < step; j += 16)
            for (int i = 0; i < 16; ++i) lanes[i] = s[j + i] > lanes[i] ? s[j + i] : lanes[i];
        for (int i = 0; i < 16; ++i) highest = lanes[i] > highest ? lanes[i] : highest, lanes[i] = 0;
        for (int64_t j = 0; j < step; j += 16)
            for (int i = 0; i < 16; ++i) lanes[i] += s[j + i] = exp_of((s[j + i] - highest) * scale);
        float sum = 0;
        for (int i = 0; i < 16; ++i) sum += lanes[i];
        total[r] = 1 / sum;
    }
    for (int64_t r = 0; r < count + kMostRows; ++r) rows[r] = scores + smaller(r, count - 1) * step;
    const float *v = p.packed_v + head * p.keys * padded;
    for (int64_t d = 0; d < padded; d += 64)
        multiply(rows, count, &none, 1, p.keys, v + d, padded, smaller(4, (padded - d) / 16), sums + d, padded, false);
    for (int64_t r = 0; r < count; ++r) {
        float *out = p.out + (from + r) * p.out_step + head * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) out[d] = sums[r * padded + d] * total[r];
    }
}

void combine(const Combine &p, int64_t task) {
    const int64_t first = p.rows * task / p.tasks, last = p.rows * (task + 1) / p.tasks, channels = p.channels;
    const float scale = p.how[0], tau = p.how[1], alpha = p.how[2], keep = p.how[3];
    for (int64_t r = first; r < last; ++r) {
        const float *positive = p.positive + r * channels, *negative = p.negative + r * channels;
        float *out = p.out + r * channels, norms[16] = {}, limits[16] = {};
        double norm = 0, limit = 0;
        for (int64_t c = 0; c < channels; ++c) out[c] = keep * positive[c] - scale * negative[c];
        int64_t c = 0;
        for (; c + 16 <= channels; c += 16)
            for (int i = 0; i < 16; ++i) {
                norms[i] += __builtin_fabsf(out[c + i]);
                limits[i] += __builtin_fabsf(positive[c + i]);
            }
        for (; c < channels; ++c) norm += __builtin_fabsf(out[c]), limit += __builtin_fabsf(positive[c]);
        for (int i = 0; i < 16; ++i) norm += norms[i], limit += limits[i];
        limit *= tau;  // infinity times nothing is NaN, which no norm is above
        const float share = alpha * static_cast<float>(norm > limit ? limit / norm : 1.0);
        for (c = 0; c < channels; ++c) out[c] = share * out[c] + (1 - alpha) * positive[c];
    }
}

void levels(const Levels &p, int64_t task) {
    const int64_t first = p.count * task / p.tasks, last = p.count * (task + 1) / p.tasks;
    int32_t wrong = 0;
    for (int64_t i = first; i < last; ++i) {
        const float x = p.x[i], y = x * 0.5f + 0.5f;
        wrong += x != x;
        p.out[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf((y > 0 ? y < 1 ? y : 1 : 0) * 255)));
    }
    p.wrong[task] = static_cast<float>(wrong);
}
