// Channels innermost. An image's positions are rows of channels; they are cut into pieces, once for the sums and once for
// the elements, so that every thread reads whole rows. The pieces depend on the shape alone, and so do the sums, fp32
// over few rows and fp64 over many. Included by group_norm_silu_cpu.cpp.

constexpr int64_t TILE = 65536;  // elements whose channels' means are the pivots of an image
constexpr int64_t STRIP = 64;    // rows that are worked on at a time, and summed in fp32
constexpr int64_t PIECE = 128;   // rows of the smallest piece
constexpr int64_t PIECES = 32;   // of an image, at most
constexpr int64_t CHUNK = 64;    // channels fetched at a time
constexpr int64_t WIDE = 512;    // channels whose parameters fill half of the first cache

template <int ROWS> using Abreast = std::integral_constant<int, ROWS>;

// task(at, Abreast<count>) for rows of n numbers that begin at `at`, ROWS together as long as there are so many: what
// belongs to a channel is then read once for all of them.
template <int ROWS, class Task>
NITRO_INLINE void by_rows(int64_t rows, int64_t n, Task task) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) task(r * n, Abreast<ROWS>());
    for (; r < rows; ++r) task(r * n, Abreast<1>());
}

// Asks for the same channels of rows further on, which may lie past the end. With the arithmetic of one line between it
// and the next, the processor by itself looks too few lines ahead.
template <int ROWS>
NITRO_INLINE void fetch(const float *x, int64_t n, int64_t ahead) {
    for (int r = 0; r < ROWS; ++r)
        for (int64_t i = 0; i < CHUNK; i += 16) __builtin_prefetch(x + (r + ahead) * n + i);
}

template <int ROWS>
NITRO_INLINE void add_deviations(const float *x, int64_t n, const float *__restrict pivot, float *__restrict s,
                                 float *__restrict q, Abreast<ROWS>) {
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) {
        float sum = 0, square = 0;
        for (int r = 0; r < ROWS; ++r) {
            const float d = x[r * n + c] - pivot[c];
            sum += d;
            square += d * d;
        }
        s[c] += sum;
        q[c] += square;
    }
}

// Per channel the sums of x - pivot and of its squares for rows [rows, n], added to sums [2, n].
NITRO_CLONES void deviations_of_rows(const float *x, int64_t rows, int64_t n, const float *pivot, float *sums) {
    by_rows<8>(rows, n, [&](int64_t at, auto abreast) __attribute__((always_inline)) {
        add_deviations(x + at, n, pivot, sums, sums + n, abreast);
    });
}

NITRO_CLONES void accumulate(const float *__restrict from, int64_t n, double *__restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <bool SILU, int ROWS>
NITRO_INLINE void apply_abreast(const float *x, float *y, int64_t n, const float *pivot, const float *scale,
                                const float *offset, Abreast<ROWS>) {
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        const int64_t end = std::min(n, chunk + CHUNK);
        fetch<ROWS>(x + chunk, n, 2);
        fetch<ROWS>(y + chunk, n, 2);
#pragma GCC ivdep
        for (int64_t i = chunk; i < end; ++i)
            for (int r = 0; r < ROWS; ++r) {
                const float z = (x[r * n + i] - pivot[i]) * scale[i] + offset[i];
                y[r * n + i] = SILU ? silu_of(z) : z;
            }
    }
}

// y = act((x - pivot) scale + offset) for rows of n channels.
NITRO_CLONES void apply_rows(const float *x, float *y, int64_t rows, int64_t n, const float *pivot, const float *scale,
                             const float *offset, bool silu) {
    const auto task = [&](int64_t at, auto abreast) __attribute__((always_inline)) {
        silu ? apply_abreast<true>(x + at, y + at, n, pivot, scale, offset, abreast)
             : apply_abreast<false>(x + at, y + at, n, pivot, scale, offset, abreast);
    };
    n < WIDE ? by_rows<1>(rows, n, task) : by_rows<2>(rows, n, task);
}

// Which rows of an image a piece has.
struct Pieces {
    int64_t rows, count;

    explicit Pieces(int64_t positions)
        : rows(std::max(PIECE, (positions + PIECES * STRIP - 1) / (PIECES * STRIP) * STRIP)),
          count((positions + rows - 1) / rows) {}

    // task(begin, rows) for the strips of a piece.
    template <class Task>
    void strips(int64_t piece, int64_t positions, Task task) const {
        const int64_t end = std::min(positions, (piece + 1) * rows);
        for (int64_t i = piece * rows; i < end; i += STRIP) task(i, std::min(STRIP, end - i));
    }
};

// Uninitialised, as most of it is never used or written first.
template <class T> std::unique_ptr<T[]> memory(int64_t n) { return std::unique_ptr<T[]>(new T[n]); }

int64_t room_of(int64_t dtype, int64_t channels) { return dtype == NITRO_F32 ? 0 : STRIP * channels; }

// Channel means of an image's first tile. A first tile far from the rest has its own share of m2, so what cancels in
// deviations from these means is at most one part in the number of tiles.
void find_pivots(const GroupNormSiluFwdParams &p, int64_t b, float *pivot) {
    const int64_t n = p.channels, rows = std::min(p.positions, std::max(STRIP, TILE / n));
    const auto room = memory<float>(2 * n + room_of(p.dtype, n));
    for (int64_t i = 0; i < rows; i += STRIP) {
        const int64_t count = std::min(STRIP, rows - i);
        const float *x = read(p.x, p.dtype, (b * p.positions + i) * n, count * n, room.get() + 2 * n);
        if (i == 0) {
            std::fill_n(room.get(), 2 * n, 0.0f);
            std::copy_n(x, n, pivot);
        }
        deviations_of_rows(x, count, n, pivot, room.get());
    }
    for (int64_t c = 0; c < n; ++c) pivot[c] += room[c] / rows;
}

// Sums of deviations [2, channels] of a piece.
void sum_piece(const GroupNormSiluFwdParams &p, int64_t b, int64_t piece, const float *pivot, double *totals) {
    const int64_t n = p.channels;
    const auto sums = memory<float>(2 * n + room_of(p.dtype, n));
    std::fill_n(totals, 2 * n, 0.0);
    Pieces(p.positions).strips(piece, p.positions, [&](int64_t i, int64_t rows) {
        const float *x = read(p.x, p.dtype, (b * p.positions + i) * n, rows * n, sums.get() + 2 * n);
        std::fill_n(sums.get(), 2 * n, 0.0f);
        deviations_of_rows(x, rows, n, pivot, sums.get());
        accumulate(sums.get(), 2 * n, totals);
    });
}

// Adds the sums of the other pieces to those of the first.
NITRO_CLONES void merge_pieces(double *sums, int64_t pieces, int64_t size) {
    for (int64_t k = 1; k < pieces; ++k)
#pragma GCC ivdep
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[k * size + i];
}

// The moments of a group from its channels' sums; pivots become what apply_rows wants.
void finish_moments(const GroupNormSiluFwdParams &p, int64_t b, int64_t g, double *sums, float *pivot, float *scale,
                    float *offset) {
    const int64_t n = p.channels, width = n / p.groups, c0 = g * width, c1 = c0 + width;
    const double count = static_cast<double>(p.positions);
    double mean = 0, m2 = 0;
    for (int64_t c = c0; c < c1; ++c) {
        const double away = sums[c] / count;
        m2 += std::max(0.0, sums[n + c] - sums[c] * away);
        sums[c] = pivot[c] + away + (p.shift ? p.shift[b * n + c] : 0.0f);
        mean += sums[c] / width;
    }
    for (int64_t c = c0; c < c1; ++c) m2 += (sums[c] - mean) * (sums[c] - mean) * count;
    const double rstd = 1.0 / std::sqrt(m2 / (count * width) + p.eps);
    p.mean[b * p.groups + g] = static_cast<float>(mean);
    p.rstd[b * p.groups + g] = static_cast<float>(rstd);
    for (int64_t c = c0; c < c1; ++c) {
        const Channel k(p, b, c, mean, rstd);
        pivot[c] = k.pivot;
        scale[c] = static_cast<float>(rstd * k.weight);
        offset[c] = k.rest * k.weight + k.bias;
    }
}

void apply_piece(const GroupNormSiluFwdParams &p, int64_t b, int64_t piece, const float *pivot, const float *scale,
                 const float *offset) {
    const int64_t n = p.channels, size = room_of(p.dtype, n);
    const auto room = memory<float>(2 * size);
    Pieces(p.positions).strips(piece, p.positions, [&](int64_t i, int64_t rows) {
        const int64_t at = (b * p.positions + i) * n;
        const float *x = read(p.x, p.dtype, at, rows * n, room.get());
        float *y = target(p.y, p.dtype, at, room.get() + size);
        apply_rows(x, y, rows, n, pivot, scale, offset, p.silu);
        write(p.y, p.dtype, at, rows * n, y);
    });
}

void forward_last(const GroupNormSiluFwdParams &p, int threads) {
    const int64_t n = p.channels, pieces = Pieces(p.positions).count;
    const auto totals = memory<double>(p.batch * pieces * 2 * n);
    const auto columns = memory<float>(p.batch * 3 * n);
    const auto of = [&](int64_t b) { return columns.get() + b * 3 * n; };
    parallel(p.batch, threads, [&](int64_t b) { find_pivots(p, b, of(b)); });
    parallel(p.batch * pieces, threads, [&](int64_t k) {
        sum_piece(p, k / pieces, k % pieces, of(k / pieces), totals.get() + k * 2 * n);
    });
    parallel(p.batch, threads, [&](int64_t b) {
        double *sums = totals.get() + b * pieces * 2 * n;
        merge_pieces(sums, pieces, 2 * n);
        for (int64_t g = 0; g < p.groups; ++g) finish_moments(p, b, g, sums, of(b), of(b) + n, of(b) + 2 * n);
    });
    parallel(p.batch * pieces, threads, [&](int64_t k) {  // backwards: the last ones are still in the cache
        const int64_t piece = p.batch * pieces - 1 - k, b = piece / pieces;
        apply_piece(p, b, piece % pieces, of(b), of(b) + n, of(b) + 2 * n);
    });
}

// The fields of Slopes of n channels.
struct Rows {
    float *pivot, *scale, *offset, *slope, *base, *bend;

    Rows(float *at, int64_t n)
        : pivot(at), scale(at + n), offset(at + 2 * n), slope(at + 3 * n), base(at + 4 * n), bend(at + 5 * n) {}
    void set(int64_t c, const Slopes &k) const {
        pivot[c] = k.pivot, scale[c] = k.scale, offset[c] = k.offset;
        slope[c] = k.slope, base[c] = k.base, bend[c] = k.bend;
    }
};

template <bool SILU, int ROWS>
NITRO_INLINE void sums_abreast(const float *dy, const float *x, int64_t n, const Rows &k, float *sums, Abreast<ROWS>) {
    const float *pivot = k.pivot, *scale = k.scale, *offset = k.offset;
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        const int64_t end = std::min(n, chunk + CHUNK);
        fetch<ROWS>(x + chunk, n, ROWS);
        fetch<ROWS>(dy + chunk, n, ROWS);
#pragma GCC ivdep
        for (int64_t i = chunk; i < end; ++i) {
            float a = 0, b = 0, c = 0;
            for (int r = 0; r < ROWS; ++r) {
                const float t = x[r * n + i] - pivot[i];
                const float d = gradient_at<SILU>(dy[r * n + i], t * scale[i] + offset[i]);
                a += d;
                b += d * t;
                c += t;
            }
            sums[i] += a;
            sums[n + i] += b;
            sums[2 * n + i] += c;
        }
    }
}

// Sums of dz, dz t, t of rows, added to sums [3, n].
NITRO_CLONES void gradient_sums_of_rows(const float *dy, const float *x, int64_t rows, int64_t n, const Rows &k,
                                        bool silu, float *sums) {
    by_rows<4>(rows, n, [&](int64_t at, auto abreast) __attribute__((always_inline)) {
        silu ? sums_abreast<true>(dy + at, x + at, n, k, sums, abreast)
             : sums_abreast<false>(dy + at, x + at, n, k, sums, abreast);
    });
}

template <bool SILU, int ROWS>
NITRO_INLINE void finish_abreast(const float *dy, const float *x, float *dx, int64_t n, const Rows &k, Abreast<ROWS>) {
    const float *pivot = k.pivot, *scale = k.scale, *offset = k.offset, *slope = k.slope, *base = k.base, *bend = k.bend;
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        const int64_t end = std::min(n, chunk + CHUNK);
        fetch<ROWS>(x + chunk, n, 2);
        fetch<ROWS>(dy + chunk, n, 2);
        fetch<ROWS>(dx + chunk, n, 2);
#pragma GCC ivdep
        for (int64_t i = chunk; i < end; ++i)
            for (int r = 0; r < ROWS; ++r) {
                const float t = x[r * n + i] - pivot[i];
                const float d = gradient_at<SILU>(dy[r * n + i], t * scale[i] + offset[i]);
                dx[r * n + i] = d * slope[i] - base[i] - t * bend[i];
            }
    }
}

// dx. dz is computed again: writing it and reading it back takes longer.
NITRO_CLONES void finish_rows(const float *dy, const float *x, float *dx, int64_t rows, int64_t n, const Rows &k,
                              bool silu) {
    by_rows<2>(rows, n, [&](int64_t at, auto abreast) __attribute__((always_inline)) {
        silu ? finish_abreast<true>(dy + at, x + at, dx + at, n, k, abreast)
             : finish_abreast<false>(dy + at, x + at, dx + at, n, k, abreast);
    });
}

// Sums of dz, dz t, t [3, channels] of a piece.
void sum_gradients(const GroupNormSiluBwdParams &p, int64_t b, int64_t piece, const Rows &slopes, double *totals) {
    const int64_t n = p.channels, size = room_of(p.dtype, n);
    const auto sums = memory<float>(3 * n + 2 * size);
    float *room = sums.get() + 3 * n;
    std::fill_n(totals, 3 * n, 0.0);
    Pieces(p.positions).strips(piece, p.positions, [&](int64_t i, int64_t rows) {
        const int64_t at = (b * p.positions + i) * n;
        const float *x = read(p.x, p.dtype, at, rows * n, room), *dy = read(p.dy, p.dtype, at, rows * n, room + size);
        std::fill_n(sums.get(), 3 * n, 0.0f);
        gradient_sums_of_rows(dy, x, rows, n, slopes, p.silu, sums.get());
        accumulate(sums.get(), 3 * n, totals);
    });
}

void finish_piece(const GroupNormSiluBwdParams &p, int64_t b, int64_t piece, const Rows &slopes) {
    const int64_t n = p.channels, size = room_of(p.dtype, n);
    const auto room = memory<float>(3 * size);
    Pieces(p.positions).strips(piece, p.positions, [&](int64_t i, int64_t rows) {
        const int64_t at = (b * p.positions + i) * n;
        const float *x = read(p.x, p.dtype, at, rows * n, room.get());
        const float *dy = read(p.dy, p.dtype, at, rows * n, room.get() + size);
        float *dx = target(p.dx, p.dtype, at, room.get() + 2 * size);
        finish_rows(dy, x, dx, rows, n, slopes, p.silu);
        write(p.dx, p.dtype, at, rows * n, dx);
    });
}

void backward_last(const GroupNormSiluBwdParams &p, int threads) {
    const int64_t n = p.channels, width = n / p.groups, pieces = Pieces(p.positions).count;
    const auto totals = memory<double>(p.batch * pieces * 3 * n);
    const auto columns = memory<float>(p.batch * 6 * n);
    const auto of = [&](int64_t b) { return Rows(columns.get() + b * 6 * n, n); };
    const auto channel = [&](int64_t b, int64_t c) {
        return Channel(p, b, c, p.mean[b * p.groups + c / width], p.rstd[b * p.groups + c / width]);
    };
    parallel(p.batch, threads, [&](int64_t b) {
        for (int64_t c = 0; c < n; ++c) of(b).set(c, Slopes(channel(b, c)));
    });
    parallel(p.batch * pieces, threads, [&](int64_t k) {
        sum_gradients(p, k / pieces, k % pieces, of(k / pieces), totals.get() + k * 3 * n);
    });
    parallel(p.batch, threads, [&](int64_t b) {
        double *sums = totals.get() + b * pieces * 3 * n, s1, s2;
        merge_pieces(sums, pieces, 3 * n);
        for (int64_t c = 0; c < n; ++c)
            sums_of_hats(channel(b, c), p.positions, &sums[c], &sums[n + c], &sums[2 * n + c]);
        for (int64_t c = 0; c < n; ++c) {
            if (c % width == 0) finish_group(p, b, c / width, sums + c, n, &s1, &s2);
            of(b).set(c, Slopes(channel(b, c), s1, s2));
        }
    });
    parallel(p.batch * pieces, threads, [&](int64_t k) {  // backwards: the last ones are still in the cache
        const int64_t piece = p.batch * pieces - 1 - k;
        finish_piece(p, piece / pieces, piece % pieces, of(piece / pieces));
    });
}
