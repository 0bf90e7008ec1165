/* Blocks of rows and columns of the activations as fp32, their activation functions, and dropout. */

enum { IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH };

/* Elements x [rows, cols] at p, fp32 or bf16, as fp32: where they lie, or widened to `tile [rows, cols]`. */
static const float *read_tile(const void *p, int64_t ld, int64_t bf16, int64_t rows, int64_t cols, float *tile,
                              int64_t *ld_tile) {
    if (!bf16) return *ld_tile = ld, p;
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *from = (const uint16_t *)p + row * ld;
        uint32_t *to = (uint32_t *)(tile + row * cols);
        for (int64_t c = 0; c < cols; c++) to[c] = (uint32_t)from[c] << 16;
    }
    return *ld_tile = cols, tile;
}

/* The tile rounded to bf16, to nearest and ties to even. */
static void write_bf16(const float *tile, int64_t rows, int64_t cols, uint16_t *p, int64_t ld) {
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t *from = (const uint32_t *)(tile + row * cols);
        uint16_t *to = p + row * ld;
        for (int64_t c = 0; c < cols; c++) {
            uint32_t bits = from[c], rounded = bits + 0x7fff + (bits >> 16 & 1);
            to[c] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded >> 16;
        }
    }
}

/* Vectors of words of a counter, each in 64 bits, where its product with another has room. */
typedef uint64_t words __attribute__((vector_size(8 * LANES)));

/* What dropout multiplies the elements (row, c0 .. c0 + cols) by, c0 a multiple of 4: 0, or 1 / (1 - p).
 *
 * Philox4x32-10 (Salmon et al., SC 2011) with the key `seed` and the counter (row, its upper half, column // 4, 0)
 * gives four columns; LANES counters at once. The Triton kernels draw the same.
 */
static void dropout_factors(uint64_t seed, double p, uint64_t row, int64_t c0, int64_t cols, float *factors) {
    const uint64_t lower = 0xFFFFFFFF;
    const uint32_t dropped = (uint32_t)(p * 2147483648.0);
    const float kept = (float)(1 / (1 - p));
    words lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int64_t c = 0; c < cols; c += 4 * LANES) {
        uint64_t k0 = seed & lower, k1 = seed >> 32;
        words none = {0}, w0 = none + (row & lower), w1 = none + (row >> 32), w3 = none;
        words w2 = lanes + (uint64_t)(c0 + c) / 4;
        for (int round = 0; round < 10; round++) {
            words low = w0 * 0xD2511F53UL, high = w2 * 0xCD9E8D57UL;
            w0 = high >> 32 ^ w1 ^ k0, w1 = high & lower;
            w2 = low >> 32 ^ w3 ^ k1, w3 = low & lower;
            k0 = (k0 + 0x9E3779B9) & lower, k1 = (k1 + 0xBB67AE85) & lower;
        }
        uint32_t drawn[4 * LANES];
        for (int i = 0; i < LANES; i++) {
            drawn[4 * i] = w0[i], drawn[4 * i + 1] = w1[i], drawn[4 * i + 2] = w2[i], drawn[4 * i + 3] = w3[i];
        }
        int64_t left = cols - c < 4 * LANES ? cols - c : 4 * LANES;
        for (int64_t i = 0; i < left; i++) factors[c + i] = drawn[i] >> 1 >= dropped ? kept : 0;
    }
}

/* a = act(h), element by element. */
static void act(int64_t activation, int64_t size, const float *h, float *a) {
    const float root = 0.70710678118654752f, c = 0.79788456080286536f;
    for (int64_t i = 0; i < size; i++) {
        float x = h[i];
        switch (activation) {
            case RELU: a[i] = x < 0 ? 0 : x; break;
            case GELU: a[i] = 0.5f * x * (1 + erff(x * root)); break;
            case GELU_TANH: a[i] = 0.5f * x * (1 + tanhf(c * (x + 0.044715f * x * x * x))); break;
            case SILU: a[i] = x / (1 + expf(-x)); break;
            case TANH: a[i] = tanhf(x); break;
            default: a[i] = x;
        }
    }
}

/* d = d · act'(h), element by element, for a = act(h). */
static void act_grad(int64_t activation, int64_t size, const float *h, const float *a, float *d) {
    const float root = 0.70710678118654752f, density = 0.39894228040143268f, c = 0.79788456080286536f;
    for (int64_t i = 0; i < size; i++) {
        float x = h[i], t;
        switch (activation) {
            case RELU: d[i] = x <= 0 ? 0 : d[i]; break;
            case GELU: d[i] *= 0.5f * (1 + erff(x * root)) + x * density * expf(-0.5f * x * x); break;
            case GELU_TANH:
                t = tanhf(c * (x + 0.044715f * x * x * x));
                d[i] *= 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * c * (1 + 3 * 0.044715f * x * x);
                break;
            case SILU:
                t = 1 / (1 + expf(-x));
                d[i] *= t * (1 + x * (1 - t));
                break;
            case TANH: d[i] *= 1 - a[i] * a[i]; break;
        }
    }
}
