// Included once per instruction set: GroupNorm and SiLU of one head's conv output, forward and backward.

inline vec exp_of(vec x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    // 2^n e^r with |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to the nearest integer.
    const vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * reinterpret_cast<vec>(exponent);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp_of(-x)); }

// Sum of `count` floats; always in the same order.
inline float sum_of(const float *x, int64_t count) {
    vec lanes = {};
    int64_t i = 0;
    for (; i + VECTOR <= count; i += VECTOR) lanes += load(x + i);
    double sum = 0;  // few terms, so this costs nothing
    for (; i < count; ++i) sum += x[i];
    for (int k = 0; k < VECTOR; ++k) sum += lanes[k];
    return static_cast<float>(sum);
}

// out[b] = sum over the columns of image b.
void sum_images(const float *x, const Columns &m, float *out) {
    if (!m.lanes) {
        for (int64_t b = 0; b < m.images; ++b) out[b] = sum_of(x + b * m.area, m.area);
        return;
    }
    for (int64_t b = 0; b < m.block; b += VECTOR) {
        vec sum = {};
        for (int64_t at = 0; at < m.area; ++at) sum += load(x + at * m.block + b);
        for (int64_t k = b; k < b + VECTOR && k < m.images; ++k) out[k] = sum[k - b];
    }
}

// Every column gets the value of its image; columns of no image get 0.
void spread(const float *value, const Columns &m, float *out) {
    if (!m.lanes) {
        zero(out, m.count());
        for (int64_t b = 0; b < m.images; ++b)
            for (int64_t at = 0; at < m.area; ++at) out[b * m.area + at] = value[b];
        return;
    }
    for (int64_t b = 0; b < m.block; ++b) out[b] = b < m.images ? value[b] : 0;
    for (int64_t at = 1; at < m.area; ++at) __builtin_memcpy(out + at * m.block, out, m.block * sizeof(float));
}

#define COLUMNS(i) for (int64_t i = 0; i < columns; i += VECTOR)

// Mean and reciprocal deviation of each image of the group y [channels, columns].
void statistics(const float *y, int64_t channels, const Columns &m, float *mean, float *deviation, float *work) {
    const int64_t columns = m.count();
    float *sum = work, *at_mean = work + columns;
    const float scale = 1.0f / static_cast<float>(channels * m.area);
    COLUMNS(i) {
        vec total = {};
        for (int64_t c = 0; c < channels; ++c) total += load(y + c * columns + i);
        store(sum + i, total);
    }
    sum_images(sum, m, mean);
    for (int64_t b = 0; b < m.images; ++b) mean[b] *= scale;
    spread(mean, m, at_mean);
    COLUMNS(i) {
        const vec center = load(at_mean + i);
        vec total = {};
        for (int64_t c = 0; c < channels; ++c) {
            const vec d = load(y + c * columns + i) - center;
            total += d * d;
        }
        store(sum + i, total);
    }
    sum_images(sum, m, deviation);
    for (int64_t b = 0; b < m.images; ++b) deviation[b] = 1.0f / __builtin_sqrtf(deviation[b] * scale + 1e-5f);
}

// One channel: a = silu((y - mean) * deviation * weight + bias); mean and deviation per column.
void activate(const float *y, const float *mean, const float *deviation, float weight, float bias, int64_t columns,
              float *a) {
    COLUMNS(i) {
        const vec h = (load(y + i) - load(mean + i)) * load(deviation + i) * weight + bias;
        store(a + i, h * sigmoid(h));
    }
}

// Backward through SiLU and GroupNorm for one group of one head.
struct NormBackward {
    const float *y, *da;  // [channels, columns]
    const float *mean, *deviation;  // [columns]
    const float *weight, *bias;  // [channels]
    const float *pooled_grad;  // [columns] gradient of the logit over the area, or null below the last layer
    float *dy;                 // [channels, columns]
    float *d_weight, *d_bias, *d_logit;  // [channels]
};

void norm_backward(const NormBackward &p, int64_t channels, const Columns &m, float *work) {
    const int64_t columns = m.count();
    float *sum = work, *sum_x = work + columns, *value = work + 2 * columns, *value_x = value + m.block;
    zero(sum, 2 * columns);
    for (int64_t c = 0; c < channels; ++c) {
        vec weight_sum = {}, bias_sum = {}, logit_sum = {};
        const float *y = p.y + c * columns, *da = p.da + c * columns;
        float *dy = p.dy + c * columns;
        COLUMNS(i) {
            const vec x = (load(y + i) - load(p.mean + i)) * load(p.deviation + i);
            const vec h = x * p.weight[c] + p.bias[c], s = sigmoid(h);
            const vec dh = load(da + i) * s * (1.0f + h * (1.0f - s)), dx = dh * p.weight[c];
            weight_sum += dh * x;
            bias_sum += dh;
            if (p.pooled_grad) logit_sum += h * s * load(p.pooled_grad + i);
            store(dy + i, dx);
            store(sum + i, load(sum + i) + dx);
            store(sum_x + i, load(sum_x + i) + dx * x);
        }
        float lanes[3][VECTOR];
        store(lanes[0], weight_sum);
        store(lanes[1], bias_sum);
        store(lanes[2], logit_sum);
        p.d_weight[c] = sum_of(lanes[0], VECTOR);
        p.d_bias[c] = sum_of(lanes[1], VECTOR);
        if (p.pooled_grad) p.d_logit[c] = sum_of(lanes[2], VECTOR);
    }
    const float scale = 1.0f / static_cast<float>(channels * m.area);
    sum_images(sum, m, value);
    sum_images(sum_x, m, value_x);
    for (int64_t b = 0; b < m.images; ++b) {
        value[b] *= scale;
        value_x[b] *= scale;
    }
    spread(value, m, sum);
    spread(value_x, m, sum_x);
    for (int64_t c = 0; c < channels; ++c)
        COLUMNS(i) {
            const vec deviation = load(p.deviation + i);
            const vec x = (load(p.y + c * columns + i) - load(p.mean + i)) * deviation;
            float *dy = p.dy + c * columns + i;
            store(dy, deviation * (load(dy) - load(sum + i) - x * load(sum_x + i)));
        }
}
