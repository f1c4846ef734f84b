// Included once per instruction set: the tasks. See head_pool_tasks.h.

int64_t group_size(const Block &k) { return k.p->head_width / k.p->groups; }

// Weight and bias of a layer's norm for one head.
const float *norm_of(const float *const *stack, const Block &k, int64_t layer, int64_t head) {
    return stack[k.level().first + layer] + k.row(head) * k.p->head_width;
}

void forward(const Block &k, int64_t head, int64_t head_end) {
    Arena arena;
    const HeadPoolParams &p = *k.p;
    const int64_t width = p.head_width, size = group_size(k), depth = k.level().depth;
    const Columns first = k.columns(0);
    const float **weights = reinterpret_cast<const float **>(arena.floats(2 * (head_end - head)));
    for (int64_t h = head; h < head_end; ++h) weights[h - head] = k.conv(0, h);
    conv_forward(k.feature(const_cast<void *>(p.features[k.entry])), {k.channels(0), k.height(0), k.width(0)}, first,
                 weights, head_end - head, width, k.y + head * width * first.count());
    float *work = arena.floats(4 * first.count()), *a = arena.floats(width * first.count());
    // What only the backward pass uses is defined all the same: the workspace is an output.
    if (head == 0) zero(k.y + k.sum(0, 0, 0), k.e().block_size - k.sum(0, 0, 0));
    float *pooled = arena.floats(k.e().block);
    double *logits = reinterpret_cast<double *>(arena.floats(2 * k.images));
    for (int64_t h = head; h < head_end; ++h) {
        for (int64_t b = 0; b < k.images; ++b) logits[b] = p.logit_bias[k.e().level][k.row(h)];
        for (int64_t l = 0; l < depth; ++l) {
            const Columns m = k.columns(l);
            const int64_t columns = m.count();
            float *y = k.y + k.matrix(l) + h * width * columns;
            if (l > 0) {
                const float *conv = k.conv(l, h);
                conv_forward(k.activation(a, l - 1), {width, k.height(l), k.width(l)}, m, &conv, 1, width, y);
            }
            const float *weight = norm_of(p.norm_weight, k, l, h), *bias = norm_of(p.norm_bias, k, l, h);
            for (int64_t g = 0; g < p.groups; ++g) {
                float *mean = k.y + k.statistic(0, l, h) + g * k.e().block;
                float *deviation = k.y + k.statistic(1, l, h) + g * k.e().block;
                statistics(y + g * size * columns, size, m, mean, deviation, work);
                zero(mean + k.images, k.e().block - k.images);
                zero(deviation + k.images, k.e().block - k.images);
                spread(mean, m, work);
                spread(deviation, m, work + columns);
                for (int64_t c = g * size; c < (g + 1) * size; ++c)
                    activate(y + c * columns, work, work + columns, weight[c], bias[c], columns, a + c * columns);
            }
        }
        const Columns m = k.columns(depth - 1);
        for (int64_t c = 0; c < width; ++c) {
            sum_images(a + c * m.count(), m, pooled);
            const float weight = p.logit_weight[k.e().level][k.row(h) * width + c];
            for (int64_t b = 0; b < k.images; ++b) logits[b] += static_cast<double>(pooled[b]) * weight / m.area;
        }
        for (int64_t b = 0; b < k.images; ++b)
            p.logits[(k.first_image + b) * p.entries * p.heads + k.entry * p.heads + h] =
                static_cast<float>(logits[b]);
    }
}

void backward(const Block &k, int64_t head, int64_t head_end) {
    Arena arena;
    const HeadPoolParams &p = *k.p;
    const int64_t width = p.head_width, size = group_size(k), depth = k.level().depth, widest = k.columns(0).count();
    float *work = arena.floats(2 * widest + 2 * k.e().block), *mean = arena.floats(widest);
    float *deviation = arena.floats(widest), *da = arena.floats(width * widest), *pooled = arena.floats(widest);
    float *grad = arena.floats(k.e().block);
    for (int64_t h = head; h < head_end; ++h) {
        for (int64_t l = depth; l-- > 0;) {
            const Columns m = k.columns(l);
            const int64_t columns = m.count();
            const float *y = k.y + k.matrix(l) + h * width * columns;
            float *dy = k.dy + k.matrix(l) + h * width * columns;
            const bool last = l == depth - 1;
            if (last) {
                for (int64_t b = 0; b < k.images; ++b)
                    grad[b] = p.grad[(k.first_image + b) * p.entries * p.heads + k.entry * p.heads + h] /
                              static_cast<float>(m.area);
                spread(grad, m, pooled);
                for (int64_t c = 0; c < width; ++c) {
                    const float weight = p.logit_weight[k.e().level][k.row(h) * width + c];
                    COLUMNS(i) store(da + c * columns + i, load(pooled + i) * weight);
                }
            }
            const float *weight = norm_of(p.norm_weight, k, l, h), *bias = norm_of(p.norm_bias, k, l, h);
            for (int64_t g = 0; g < p.groups; ++g) {
                spread(k.y + k.statistic(0, l, h) + g * k.e().block, m, mean);
                spread(k.y + k.statistic(1, l, h) + g * k.e().block, m, deviation);
                const int64_t c = g * size;
                norm_backward({y + c * columns, da + c * columns, mean, deviation, weight + c, bias + c,
                               last ? pooled : nullptr, dy + c * columns, k.dy + k.sum(0, l, h) + c,
                               k.dy + k.sum(1, l, h) + c, k.dy + k.sum(2, 0, h) + c},
                              size, m, work);
            }
            if (l == 0) continue;
            const Columns above = k.columns(l - 1);
            if (!m.lanes) zero(da, width * above.count());  // columns of no image stay zero
            const float *conv = k.conv(l, h);
            conv_to_input(dy, {width, k.height(l), k.width(l)}, m, &conv, 1, width, 0, width, k.activation(da, l - 1));
        }
    }
}

// By tiles W wide, or none.
template <int W>
void weights_by(const Block *blocks, int64_t count, int64_t layer, int64_t c, int64_t c_end, float *out, const bool *first) {
    const Block &k = blocks[0];
    const HeadPoolParams &p = *k.p;
    const int64_t width = p.head_width, channels = k.channels(layer), columns = k.columns(layer).count();
    const Shape shape = {channels, k.height(layer), k.width(layer)};
    const int64_t padded_w = 2 * (shape.width / 2) + 2, padded_h = 2 * (shape.height / 2) + 2;
    constexpr bool tiled = W > 0;
    // Few columns do not pay for sums over lanes.
    const bool lanes = k.e().lanes && columns >= 8 * kLanes;
    const int64_t packed = lanes ? padded_h * padded_w * k.e().block : 16 * columns;  // floats of one channel
    constexpr int64_t kMost = 24;
    const int64_t step = tiled ? 16 : smaller(smaller(kMost, c_end - c), kPanel / packed > 3 ? kPanel / packed : 3);
    const Tiles tiles = tiles_of(shape, k.columns(layer), tiled ? W : 2);
    Arena arena;
    float *wide = arena.floats(tiled ? points_of(W) * tiles.point(p.heads * width) : 0);
    float *panel = arena.floats(tiled ? points_of(W) * tiles.point(kDeep) : step * packed);
    float *plane = lanes ? nullptr : arena.floats(padded_h * padded_w);
    int64_t *run = reinterpret_cast<int64_t *>(arena.floats(2 * (columns / kLanes + kMost)));
    if (lanes)
        plan_lanes(k.columns(layer), shape.width / 2, padded_w, 2, run);
    else
        for (int64_t i = 0; i < kMost; ++i) run[i] = i * kLanes;
    const Columns input = layer > 0 ? k.columns(layer - 1) : Columns{};
    float *a = arena.floats(step * input.count()), *mean = arena.floats(input.count());
    float *deviation = arena.floats(input.count());

    auto pack = [&](const Block &block, const View &x, int64_t from, int64_t number) {
        if constexpr (tiled)
            tiles_of_input<W>(x, shape, block.columns(layer), from, true, panel);
        else if (lanes)
            pack_lanes(x, shape, block.columns(layer), from, from + number, panel);
        else
            pack_patches(x, shape, block.columns(layer), from, number, plane, panel);
    };
    auto sweep = [&](const Block &block, int64_t from, int64_t number, int64_t head, bool add) {
        const float *dy = block.dy + block.matrix(layer) + head * width * columns;
        float *to = out + (block.row(head) * width * channels + from) * 16;
        if constexpr (tiled) {
            tiles_to_weights<W>(wide + head * width * tiles.pitch(), p.heads * width, panel, tiles, width, to,
                                channels * 16, add);
            return;
        }
        if (lanes) {
            lanes_to_weights(dy, panel, run, block.columns(layer), packed, padded_w * k.e().block, width, number, to,
                             channels * 16, add);
            return;
        }
        int64_t tap[16];
        for (int64_t t = 0; t < 16; ++t) tap[t] = t * number * 16;
        const Product product = {dy, columns, 16, panel, run, 16 * number * 16, tap, columns / 16,
                                 to, run, channels * 16, add, chunk_of(columns)};
        multiply<kWindow>(product, width, number);
    };
    for (int64_t i = 0; i < count; ++i) {
        const Block &block = blocks[i];
        if constexpr (tiled)
            tiles_of_output<W>(block.dy + block.matrix(layer), shape, block.columns(layer), p.heads * width, wide);
        for (int64_t from = c; from < c_end; from += step) {
            const int64_t number = smaller(step, c_end - from);
            if (layer == 0) {
                pack(block, block.feature(const_cast<void *>(p.features[block.entry])), from, number);
                for (int64_t h = 0; h < p.heads; ++h) sweep(block, from, number, h, i > 0 || !first[h]);
                continue;
            }
            const Columns above = block.columns(layer - 1);
            for (int64_t h = 0; h < p.heads; ++h) {
                const float *y = block.y + block.matrix(layer - 1) + h * width * above.count();
                const float *weight = norm_of(p.norm_weight, block, layer - 1, h);
                const float *bias = norm_of(p.norm_bias, block, layer - 1, h);
                for (int64_t j = from; j < from + number; ++j) {
                    const int64_t g = j / group_size(block) * block.e().block;
                    spread(block.y + block.statistic(0, layer - 1, h) + g, above, mean);
                    spread(block.y + block.statistic(1, layer - 1, h) + g, above, deviation);
                    activate(y + j * above.count(), mean, deviation, weight[j], bias[j], above.count(),
                             a + (j - from) * above.count());
                }
                View x = block.activation(a, layer - 1);
                x.data = a - from * x.channel;  // channel `from` is its first
                pack(block, x, from, number);
                sweep(block, from, number, h, i > 0 || !first[h]);
            }
        }
    }
}

void weights(const Block *blocks, int64_t count, int64_t layer, int64_t c, int64_t c_end, float *out, const bool *first) {
    const Block &k = blocks[0];
    const Shape shape = {k.channels(layer), k.height(layer), k.width(layer)};
    const int64_t width = k.p->head_width, rows = layer == 0 ? k.p->heads * width : width;
    const int wide = tiles_for(shape, k.columns(layer), rows, width);
    const auto run = wide == 4 ? weights_by<4> : wide == 2 ? weights_by<2> : weights_by<0>;
    run(blocks, count, layer, c, c_end, out, first);
}

void features(const Block &k, int64_t c, int64_t c_end) {
    Arena arena;
    const float **weights = reinterpret_cast<const float **>(arena.floats(2 * k.p->heads));
    for (int64_t h = 0; h < k.p->heads; ++h) weights[h] = k.conv(0, h);
    conv_to_input(k.dy, {k.channels(0), k.height(0), k.width(0)}, k.columns(0), weights, k.p->heads, k.p->head_width, c, c_end,
                  k.feature(k.p->out[k.entry]));
}
