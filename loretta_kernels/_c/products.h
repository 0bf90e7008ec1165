/* The three products of a few rows of a wide matrix with a table P [K, cols] of K long rows.
 *
 *     dot       s += x · Pᵀ            x [rows, cols], s [rows, K], of which each is LANES sums until fold adds them up
 *     expand    y  = base + s · P      y, base [rows, cols]
 *     outer     D += sᵀ · x            D [K, cols]
 *
 * A tile of sums stays in registers. Matrices are row-major; ld is the distance of two rows. A base of NULL is zero, and
 * one whose ld is 0 is a single row. The compiler gets the sizes of tiles as constants, so that it unrolls them.
 */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
enum { LANES = 16, REGISTERS = 32 };
#elif defined(__AVX__)
enum { LANES = 8, REGISTERS = 16 };
#elif defined(__aarch64__)
enum { LANES = 4, REGISTERS = 32 };
#else
enum { LANES = 4, REGISTERS = 16 };
#endif

/* Tiles of sums: TALL rows x KS of dot, ROWS x WIDE vectors of expand, KS x WIDE vectors of outer. */
enum { KS = 6, TALL = REGISTERS / 8, ROWS = 4, WIDE = REGISTERS / 8 };

typedef float vec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec splat(float a) { return a - (vec){0}; }

/* Four columns at a time, where there are not enough for a vec. */
typedef float quad __attribute__((vector_size(16)));

INLINE quad load4(const float *p) {
    quad v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store4(float *p, quad v) { memcpy(p, &v, sizeof v); }

/* s += the sums of the lanes of `count` vectors. */
static void fold(int64_t count, const float *sums, float *s) {
    for (int64_t k = 0; k < count; k++) {
        quad total = {0};
        for (int lane = 0; lane < LANES; lane += 4) total += load4(sums + k * LANES + lane);
        s[k] += (total[0] + total[2]) + (total[1] + total[3]);
    }
}

INLINE void dot_tile(const int rows, const int K, int64_t cols, const float *x, int64_t ldx, const float *P,
                     int64_t ldp, float *sums, int64_t lds) {
    vec acc[TALL][KS];
    int64_t c = 0;
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < K; k++) acc[row][k] = load(sums + (row * lds + k) * LANES);
    for (; c + LANES <= cols; c += LANES)
        for (int k = 0; k < K; k++) {
            vec p = load(P + k * ldp + c);
            for (int row = 0; row < rows; row++) acc[row][k] += load(x + row * ldx + c) * p;
        }
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < K; k++) {
            float *to = sums + (row * lds + k) * LANES;
            store(to, acc[row][k]);
            const float *end = x + row * ldx + c, *other = P + k * ldp + c;
            int64_t i = 0;
            for (; c + i + 4 <= cols; i += 4) store4(to + i, load4(to + i) + load4(end + i) * load4(other + i));
            for (; c + i < cols; i++) to[i] += end[i] * other[i];
        }
}

INLINE void dot_rows(const int K, int64_t rows, int64_t cols, const float *x, int64_t ldx, const float *P, int64_t ldp,
                     float *sums, int64_t lds) {
    int64_t row = 0;
    for (; row + TALL <= rows; row += TALL)
        dot_tile(TALL, K, cols, x + row * ldx, ldx, P, ldp, sums + row * lds * LANES, lds);
    for (; row < rows; row++) dot_tile(1, K, cols, x + row * ldx, ldx, P, ldp, sums + row * lds * LANES, lds);
}

static void dot(int64_t rows, int64_t cols, int64_t K, const float *x, int64_t ldx, const float *P, int64_t ldp,
                float *sums) {
    const int64_t lds = K;
    while (K > 0) {
        int64_t tiles = (K + KS - 1) / KS, k = (K + tiles - 1) / tiles;
        switch (k) {
            case 6: dot_rows(6, rows, cols, x, ldx, P, ldp, sums, lds); break;
            case 5: dot_rows(5, rows, cols, x, ldx, P, ldp, sums, lds); break;
            case 4: dot_rows(4, rows, cols, x, ldx, P, ldp, sums, lds); break;
            case 3: dot_rows(3, rows, cols, x, ldx, P, ldp, sums, lds); break;
            case 2: dot_rows(2, rows, cols, x, ldx, P, ldp, sums, lds); break;
            default: dot_rows(1, rows, cols, x, ldx, P, ldp, sums, lds);
        }
        K -= k, P += k * ldp, sums += k * LANES;
    }
}

INLINE void expand_tile(const int rows, const int wide, int64_t K, const float *s, int64_t lds, const float *P,
                        int64_t ldp, const float *base, int64_t ldb, float *y, int64_t ldy) {
    vec acc[ROWS][WIDE];
    for (int row = 0; row < rows; row++)
        for (int w = 0; w < wide; w++) acc[row][w] = base ? load(base + row * ldb + w * LANES) : (vec){0};
    for (int64_t k = 0; k < K; k++) {
        vec p[WIDE];
        for (int w = 0; w < wide; w++) p[w] = load(P + k * ldp + w * LANES);
        for (int row = 0; row < rows; row++) {
            vec factor = splat(s[row * lds + k]);
            for (int w = 0; w < wide; w++) acc[row][w] += factor * p[w];
        }
    }
    for (int row = 0; row < rows; row++)
        for (int w = 0; w < wide; w++) store(y + row * ldy + w * LANES, acc[row][w]);
}

INLINE void expand_rows(const int rows, int64_t cols, int64_t K, const float *s, int64_t lds, const float *P,
                        int64_t ldp, const float *base, int64_t ldb, float *y, int64_t ldy) {
    int64_t c = 0;
    for (; c + WIDE * LANES <= cols; c += WIDE * LANES)
        expand_tile(rows, WIDE, K, s, lds, P + c, ldp, base ? base + c : base, ldb, y + c, ldy);
    for (; c + LANES <= cols; c += LANES)
        expand_tile(rows, 1, K, s, lds, P + c, ldp, base ? base + c : base, ldb, y + c, ldy);
    for (; c + 4 <= cols; c += 4)
        for (int row = 0; row < rows; row++) {
            quad total = base ? load4(base + row * ldb + c) : (quad){0};
            for (int64_t k = 0; k < K; k++) total += s[row * lds + k] * load4(P + k * ldp + c);
            store4(y + row * ldy + c, total);
        }
    for (; c < cols; c++)
        for (int row = 0; row < rows; row++) {
            float total = base ? base[row * ldb + c] : 0;
            for (int64_t k = 0; k < K; k++) total += s[row * lds + k] * P[k * ldp + c];
            y[row * ldy + c] = total;
        }
}

static void expand(int64_t rows, int64_t cols, int64_t K, const float *s, int64_t lds, const float *P, int64_t ldp,
                   const float *base, int64_t ldb, float *y, int64_t ldy) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        expand_rows(ROWS, cols, K, s + row * lds, lds, P, ldp, base ? base + row * ldb : base, ldb, y + row * ldy, ldy);
    for (; row < rows; row++)
        expand_rows(1, cols, K, s + row * lds, lds, P, ldp, base ? base + row * ldb : base, ldb, y + row * ldy, ldy);
}

INLINE void outer_tile(const int K, const int wide, int64_t rows, const float *s, int64_t lds, const float *x,
                       int64_t ldx, float *D, int64_t ldd) {
    vec acc[KS][WIDE];
    for (int k = 0; k < K; k++)
        for (int w = 0; w < wide; w++) acc[k][w] = load(D + k * ldd + w * LANES);
    for (int64_t row = 0; row < rows; row++) {
        vec v[WIDE];
        for (int w = 0; w < wide; w++) v[w] = load(x + row * ldx + w * LANES);
        for (int k = 0; k < K; k++) {
            vec factor = splat(s[row * lds + k]);
            for (int w = 0; w < wide; w++) acc[k][w] += factor * v[w];
        }
    }
    for (int k = 0; k < K; k++)
        for (int w = 0; w < wide; w++) store(D + k * ldd + w * LANES, acc[k][w]);
}

INLINE void outer_k(const int K, int64_t rows, int64_t cols, const float *s, int64_t lds, const float *x, int64_t ldx,
                    float *D, int64_t ldd) {
    int64_t c = 0;
    for (; c + WIDE * LANES <= cols; c += WIDE * LANES) outer_tile(K, WIDE, rows, s, lds, x + c, ldx, D + c, ldd);
    for (; c + LANES <= cols; c += LANES) outer_tile(K, 1, rows, s, lds, x + c, ldx, D + c, ldd);
    for (; c + 4 <= cols; c += 4)
        for (int k = 0; k < K; k++) {
            quad total = load4(D + k * ldd + c);
            for (int64_t row = 0; row < rows; row++) total += s[row * lds + k] * load4(x + row * ldx + c);
            store4(D + k * ldd + c, total);
        }
    for (; c < cols; c++)
        for (int k = 0; k < K; k++) {
            float total = D[k * ldd + c];
            for (int64_t row = 0; row < rows; row++) total += s[row * lds + k] * x[row * ldx + c];
            D[k * ldd + c] = total;
        }
}

static void outer(int64_t rows, int64_t cols, int64_t K, const float *s, int64_t lds, const float *x, int64_t ldx,
                  float *D, int64_t ldd) {
    while (K > 0) {
        int64_t tiles = (K + KS - 1) / KS, k = (K + tiles - 1) / tiles;
        switch (k) {
            case 6: outer_k(6, rows, cols, s, lds, x, ldx, D, ldd); break;
            case 5: outer_k(5, rows, cols, s, lds, x, ldx, D, ldd); break;
            case 4: outer_k(4, rows, cols, s, lds, x, ldx, D, ldd); break;
            case 3: outer_k(3, rows, cols, s, lds, x, ldx, D, ldd); break;
            case 2: outer_k(2, rows, cols, s, lds, x, ldx, D, ldd); break;
            default: outer_k(1, rows, cols, s, lds, x, ldx, D, ldd);
        }
        K -= k, D += k * ldd, s += k;
    }
}
