// Included once per instruction set, inside an unnamed namespace: vectors and the one matrix kernel under all three convs.

#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR)));
typedef float vec_at __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

inline vec load(const float *p) { return *reinterpret_cast<const vec_at *>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec_at *>(p) = v; }
inline vec splat(float f) { return f - vec{}; }  // f + 0 would not be f for -0, so it would be an addition

// Which elements of `a` a step takes: 16 in a row (the taps of a channel, or columns), or the 4 taps of a channel that one
// parity class of the input sees; there the rows are channels, so 16 apart.
enum Taps { kWindow, kParity };
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
    float *c;  // run v at c + 16 v
    int64_t c_row;
    bool add;
};

template <int R, int U, Taps K>
inline void tile(const Product &p, int64_t row, int64_t unit) {
    constexpr int T = K == kWindow ? 16 : 4;
    constexpr int64_t parts = kLanes / VECTOR;
    constexpr int64_t kSteps = 64 / T;  // sums of 64 products are added to the total: rounding stays that of short sums
    const int64_t a_row = K == kParity ? 16 : p.a_row;
    const float *a = p.a + row * a_row, *b[U];
    float *c = p.c + row * p.c_row + unit * VECTOR;
    UNROLL for (int u = 0; u < U; ++u) b[u] = p.b + p.b_run[(unit + u) / parts] + (unit + u) % parts * VECTOR;
    for (int64_t first = 0; first < p.steps; first += kSteps) {
        vec sum[R][U] = {};
        const int64_t end = smaller(first + kSteps, p.steps);
        for (int64_t s = first; s < end; ++s) {
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
                float *at = c + r * p.c_row + u * VECTOR;
                store(at, add ? load(at) + sum[r][u] : sum[r][u]);
            }
    }
}

template <int R, Taps K>
inline void tiles_of_rows(const Product &p, int64_t row, int64_t units) {
    const int64_t count = (units + UNITS - 1) / UNITS;  // of nearly equal width: 4 units are 2 + 2, not 3 + 1
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = units * i / count, width = units * (i + 1) / count - from;
        if (width == 1) tile<R, 1, K>(p, row, from);
        if (width == 2) tile<R, 2, K>(p, row, from);
        if (width == 3) tile<R, 3, K>(p, row, from);
    }
}

template <Taps K>
void multiply(const Product &p, int64_t rows, int64_t runs) {
    const int64_t units = runs * (kLanes / VECTOR);
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) tiles_of_rows<ROWS, K>(p, row, units);
    for (; row < rows; ++row) tiles_of_rows<1, K>(p, row, units);
}
