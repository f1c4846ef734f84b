// Included once per instruction set, inside an unnamed namespace: vectors and the one matrix kernel under all three convs.

#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR)));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec_at __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

inline vec load(const float *p) { return *reinterpret_cast<const vec_at *>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec_at *>(p) = v; }
// Past the caches; `p` is aligned. What was written so is seen by other threads after a fence.
inline void store_past(float *p, vec v) {
#if VECTOR == 16
    __builtin_ia32_movntps512(p, v);
#else
    store(p, v);
#endif
}
inline void fence() {
#if VECTOR == 16
    __builtin_ia32_sfence();
#endif
}
inline vec splat(float f) { return f - vec{}; }  // f + 0 would not be f for -0, so it would be an addition

// Which elements of `a` a step takes: 16 in a row (the taps of a channel, or columns), or the 4 taps of a channel that one
// parity class of the input sees; there the rows are channels, so 16 apart. kPacked is a window of packed memory.
enum Taps { kWindow, kParity, kPacked };
constexpr int64_t kParityTap[4] = {0, 2, 8, 10};

// c[r][v] (+)= sum over steps s and taps t of a[r][s][t] * b[v][s][t]: scalars of a against runs of 16 of b, each read
// where it lies. That covers convs whose weights are not packed at all.
struct Product {
    const float *a;
    int64_t a_row, a_step;
    const float *b;
    const int64_t *b_run;  // where each run of 16 begins
    int64_t b_step;
    const int64_t *b_tap;
    int64_t steps;
    float *c;
    const int64_t *c_run;
    int64_t c_row;
    bool add;
    int64_t chunk;  // products per short sum; these are added to the total
    bool far = false;  // a comes from memory, as filters_are_far() says
};

// Rounding stays that of short sums: of 64 products, of 16 where there are few anyway.
inline int64_t chunk_of(int64_t products) { return products <= 512 ? 16 : 64; }

// Whether the filters of a head are more than 1 MB, which caches do not hold: they are fetched early.
inline bool filters_are_far(int64_t head_width, int64_t channels) { return head_width * channels >= 1 << 14; }

template <int R, int U, Taps K>
inline void tile(const Product &p, int64_t row, int64_t unit) {
    constexpr int T = K == kParity ? 4 : 16;
    constexpr int64_t parts = kLanes / VECTOR;
    const int64_t chunk = p.chunk / T;
    const int64_t a_row = K == kParity ? 16 : p.a_row;
    const float *a = p.a + row * a_row, *b[U];
    float *c[U];
    UNROLL for (int u = 0; u < U; ++u) {
        const int64_t run = (unit + u) / parts, part = (unit + u) % parts * VECTOR;
        b[u] = p.b + p.b_run[run] + part;
        c[u] = p.c + row * p.c_row + p.c_run[run] + part;
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int u = 0; u < U; ++u) __builtin_prefetch(c[u] + r * p.c_row, 1);
    for (int64_t first = 0; first < p.steps; first += chunk) {
        vec sum[R][U] = {};
        const int64_t end = smaller(first + chunk, p.steps);
        for (int64_t s = first; s < end; ++s) {
            // Rows are many streams, which the processor does not foresee.
            UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(a + r * a_row + (K == kPacked ? 8 : 4) * p.a_step);
            if (K == kWindow && p.far)
                UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(a + r * a_row + 24 * p.a_step, 0, 2);
            for (int t = 0; t < T; ++t) {
                vec x[U];
                UNROLL for (int u = 0; u < U; ++u) x[u] = load(b[u] + p.b_tap[t]);
                UNROLL for (int r = 0; r < R; ++r) {
                    const vec w = splat(a[r * a_row + (K == kParity ? kParityTap[t] : t)]);
                    UNROLL for (int u = 0; u < U; ++u) sum[r][u] += w * x[u];
                }
            }
            a += p.a_step;
            UNROLL for (int u = 0; u < U; ++u) b[u] += p.b_step;
        }
        const bool add = p.add || first > 0;
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int u = 0; u < U; ++u) {
                float *at = c[u] + r * p.c_row;
                store(at, add ? load(at) + sum[r][u] : sum[r][u]);
            }
    }
}

template <int R, int U, Taps K>
inline int64_t tiles(const Product &p, int64_t row, int64_t rows, int64_t unit) {
    for (; row + R <= rows; row += R) tile<R, U, K>(p, row, unit);
    return row;
}

// As many rows at a time as there are registers for their sums.
template <int U, Taps K>
inline void tiles_of_units(const Product &p, int64_t row, int64_t rows, int64_t unit) {
    constexpr int most = K == kWindow ? 8 : K == kPacked && U == 1 ? 16 : 12, R = SUMS / U < most ? SUMS / U : most;
    row = tiles<4, U, K>(p, tiles<R, U, K>(p, row, rows, unit), rows, unit);
    tiles<1, U, K>(p, row, rows, unit);
}

template <Taps K>
void multiply(const Product &p, int64_t rows, int64_t runs) {
    constexpr int64_t widest = K == kPacked ? UNITS_PACKED : UNITS;
    const int64_t units = runs * (kLanes / VECTOR), count = (units + widest - 1) / widest;
    // Rows of weights as they lie are often a multiple of 4 KB apart: more than 8 compete for the same lines of the L1 cache.
    const int64_t at_once = K == kWindow ? 8 : rows;
    for (int64_t row = 0; row < rows; row += at_once)
        for (int64_t i = 0; i < count; ++i) {  // of nearly equal width: 4 units are 2 + 2, not 3 + 1
            const int64_t from = units * i / count, width = units * (i + 1) / count - from;
            const int64_t end = smaller(row + at_once, rows);
            if (width == 1) tiles_of_units<1, K>(p, row, end, from);
            if (width == 2) tiles_of_units<2, K>(p, row, end, from);
            if (width == 3) tiles_of_units<3, K>(p, row, end, from);
            if constexpr (widest == 4)
                if (width == 4) tiles_of_units<4, K>(p, row, end, from);
        }
}

// Two half-way results of 16x16 transposition: of each pair of lanes that differ in bit S, the lower of a and b, the upper.
#if VECTOR == 16
#define LANES_OF(f) ivec{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)}
#define LOWER(j) (j & S ? 16 + j - S : j)
#define UPPER(j) (j & S ? 16 + j : j + S)
template <int S>
inline vec lower(vec a, vec b) {
    return __builtin_shuffle(a, b, LANES_OF(LOWER));
}
template <int S>
inline vec upper(vec a, vec b) {
    return __builtin_shuffle(a, b, LANES_OF(UPPER));
}

template <int S>
inline void exchange(vec *rows) {
    UNROLL for (int i = 0; i < 16; ++i) {
        if (i & S) continue;
        const vec a = rows[i], b = rows[i + S];
        rows[i] = lower<S>(a, b);
        rows[i + S] = upper<S>(a, b);
    }
}
#endif

// In place.
inline void transpose16(float *square) {
#if VECTOR == 16
    vec rows[16];
    UNROLL for (int i = 0; i < 16; ++i) rows[i] = load(square + 16 * i);
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
    UNROLL for (int i = 0; i < 16; ++i) store(square + 16 * i, rows[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = square[16 * i + j];
            square[16 * i + j] = square[16 * j + i];
            square[16 * j + i] = kept;
        }
#endif
}

// out[i] = sum of sums[i]. Destroys sums.
inline void sum_each(vec (&sums)[16], float *out) {
#if VECTOR == 16
    UNROLL for (int i = 0; i < 16; i += 2) sums[i] = lower<1>(sums[i], sums[i + 1]) + upper<1>(sums[i], sums[i + 1]);
    UNROLL for (int i = 0; i < 16; i += 4) sums[i] = lower<2>(sums[i], sums[i + 2]) + upper<2>(sums[i], sums[i + 2]);
    UNROLL for (int i = 0; i < 16; i += 8) sums[i] = lower<4>(sums[i], sums[i + 4]) + upper<4>(sums[i], sums[i + 4]);
    store(out, lower<8>(sums[0], sums[8]) + upper<8>(sums[0], sums[8]));
#else
    for (int i = 0; i < 16; ++i) {
        out[i] = 0;
        for (int k = 0; k < VECTOR; ++k) out[i] += sums[i][k];
    }
#endif
}
