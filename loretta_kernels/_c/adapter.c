/* y = residual + scale · (act(drop(x) · W_down + b_down) · W_up + b_up) and its gradients, each in one pass over the rows.
 *
 *     s = drop(x) · L_d     h = s · R_d + b_d     a = act(h)     z = a · L_u     y = residual + scale · (z · R_u + b_u)
 *
 *     dz = scale · dy · R_uᵀ      dR_u = scale · zᵀ · dy      db_u = scale · sum(dy)
 *     da = dz · L_uᵀ              dL_u = aᵀ · dz
 *     dh = da · act'(h)           dR_d = sᵀ · dh              db_d = sum(dh)
 *     ds = dh · R_dᵀ              dL_d = drop(x)ᵀ · ds
 *     dx = [residual is x] · dy + drop'(ds · L_dᵀ)            dscale = <zᵀ · dy, R_u> + <sum(dy), b_u>
 *
 * A single train, y = x · L · R + b, is the same with nothing between z and s: B is 0 then, L_d its L and R_u its R.
 *
 * A block of rows at a time, and of it a block of columns: what comes from memory is used for all that needs it while it
 * is in the cache. x, dy, residual, y and dx are fp32 or bf16; everything else is fp32. Threads share the rows; each has
 * sums of its own, which are added up in order.
 */

#include <math.h>
#include <sys/mman.h>

#include "products.h"
#include "rows.h"
#include "train.h"

enum { BLOCK = 1 << 15, LEAST_ROWS = 4, MOST_ROWS = 64, COLUMNS = 512 };
enum { DX = 1, DDOWN = 2, DDOWN_BIAS = 4, DUP = 8, DUP_BIAS = 16, DSCALE = 32 };

typedef struct {
    int64_t N, I, B, O;           /* rows; features of x, of the bottleneck (0 for a single train), of y */
    int64_t x_bf16, y_bf16, residual_bf16; /* or fp32; dx is as x, dy as y */
    int64_t activation, residual_is_x, needs, threads;
    int64_t cores[2], cut[2];     /* of the down and the up train: how many cores, and how many of them before the cut */
    const int64_t *modes[2], *ranks[2];
    int64_t ldx, ldy, ldr;        /* of x, dy and residual: from row to row; what is written is dense */
    uint64_t seed;
    double dropout_p;
    float scale;
    const void *x, *residual, *dy;
    const float *down, *down_bias, *up, *up_bias;
    float *waist;                 /* s [N, K], written forward, read backward */
    void *y, *dx;
    float *ddown, *ddown_bias, *dup, *dup_bias, *dscale;
    float *room;                  /* room_size floats to work in */
    int64_t room_size;
} Call;

/* The sides, sizes, and where everything lies in the room. */
typedef struct {
    Side Ld, Rd, Lu, Ru;
    int64_t K, M, step, threads;
    float *Lt, *Rd_table, *Lut, *R;                  /* [K, I], [K, B], [M, B], [M + 1, O] with b_u last */
    float *dLt, *dRd, *dLut, *dbd, *dR;              /* the first thread's sums; those of the next lie sums_size on */
    float *h, *a, *z, *dz, *da, *ds, *dots, *tiles;  /* the first thread's rows; those of the next lie rows_size on */
    float *back;                                     /* of core_grads */
    int64_t sums_size, rows_size, size;
} Plan;

static Side side_of(const Call *call, int train, int output) {
    int64_t from = output ? call->cut[train] : 0, to = output ? call->cores[train] : call->cut[train];
    return (Side){.cores = to - from, .C = call->ranks[train][to], .n = call->modes[train] + from,
                  .r = call->ranks[train] + from};
}

INLINE float *take(Plan *plan, float *room, int64_t size) {
    float *start = room + plan->size;
    plan->size += (size + 15) & ~15; /* whole cache lines */
    return start;
}

static Plan plan_of(const Call *call, int backward) {
    int last = call->B ? 1 : 0;
    int64_t I = call->I, B = call->B, O = call->O, wide = I > O ? I : O;
    Plan plan = {.Ld = side_of(call, 0, 0), .Rd = side_of(call, 0, 1), .Lu = side_of(call, last, 0),
                 .Ru = side_of(call, last, 1)};
    int64_t K = plan.K = plan.Ld.C, M = plan.M = plan.Lu.C;
    int64_t step = BLOCK / wide & ~(ROWS - 1);
    plan.step = step = step < LEAST_ROWS ? LEAST_ROWS : step > MOST_ROWS ? MOST_ROWS : step;
    int64_t blocks = (call->N + step - 1) / step;
    plan.threads = call->threads < blocks ? call->threads : blocks;
    if (plan.threads < 1) plan.threads = 1;

    float *room = call->room;
    plan.Lt = take(&plan, room, K * I), plan.Rd_table = take(&plan, room, K * B);
    plan.Lut = take(&plan, room, M * B), plan.R = take(&plan, room, (M + 1) * O);
    if (backward) {
        int64_t before = plan.size;
        plan.dLt = take(&plan, room, K * I), plan.dRd = take(&plan, room, K * B);
        plan.dLut = take(&plan, room, M * B), plan.dbd = take(&plan, room, B), plan.dR = take(&plan, room, (M + 1) * O);
        plan.sums_size = plan.size - before, plan.size += (plan.threads - 1) * plan.sums_size;
    }
    int64_t before = plan.size;
    plan.h = take(&plan, room, step * B), plan.a = take(&plan, room, step * B);
    plan.z = take(&plan, room, step * (M + 1)), plan.dz = take(&plan, room, step * M);
    plan.da = take(&plan, room, step * B), plan.ds = take(&plan, room, step * K);
    plan.dots = take(&plan, room, step * LANES * (K > M ? K : M)), plan.tiles = take(&plan, room, 4 * step * COLUMNS);
    plan.rows_size = plan.size - before, plan.size += (plan.threads - 1) * plan.rows_size;

    plan.Ld.T = plan.Lt, plan.Rd.T = plan.Rd_table, plan.Lu.T = plan.Lut, plan.Ru.T = plan.R;
    plan.Ld.G = plan.Rd.G = call->down, plan.Lu.G = plan.Ru.G = B ? call->up : call->down;
    Side *sides[] = {&plan.Ld, &plan.Rd, &plan.Lu, &plan.Ru};
    int64_t most = 0;
    for (int k = 0; k < 4; k++) {
        if (!B && (k == 1 || k == 2)) continue;
        most = back_size(sides[k]) > most ? back_size(sides[k]) : most;
        sides[k]->partials = take(&plan, room, partials_size(sides[k]));
        if (k & 1) sides[k]->G += side_params(sides[k - 1]);
    }
    plan.back = take(&plan, room, most);
    return plan;
}

/* Fill the tables. */
static void contract_sides(const Call *call, const Plan *plan) {
    contract(&plan->Ld), contract(&plan->Ru);
    if (call->B) contract(&plan->Rd), contract(&plan->Lu);
    if (call->up_bias) memcpy(plan->R + plan->M * call->O, call->up_bias, sizeof(float) * call->O);
}

INLINE void *at(const void *p, int64_t bf16, int64_t element) { return (char *)p + (bf16 ? 2 : 4) * element; }

/* A block of columns of an activation, of elements that lie ld apart from row to row, as fp32; NULL for NULL. */
static const float *read(const void *p, int64_t ld, int64_t bf16, int64_t row, int64_t rows, int64_t c, int64_t cols,
                         float *tile, int64_t *ld_tile) {
    if (!p) return *ld_tile = 0, NULL;
    return read_tile(at(p, bf16, row * ld + c), ld, bf16, rows, cols, tile, ld_tile);
}

/* A block of columns of drop(x) as fp32; what dropout multiplied by is left in `factors`. */
static const float *read_x(const Call *call, int64_t row, int64_t rows, int64_t c, int64_t cols, float *tile,
                           float *factors, int64_t *ld) {
    const float *x = read(call->x, call->ldx, call->x_bf16, row, rows, c, cols, tile, ld);
    if (call->dropout_p == 0) return x;
    for (int64_t n = 0; n < rows; n++) {
        dropout_factors(call->seed, call->dropout_p, row + n, c, cols, factors + n * cols);
        for (int64_t k = 0; k < cols; k++) tile[n * cols + k] = x[n * *ld + k] * factors[n * cols + k];
    }
    return *ld = cols, tile;
}

/* h, a and z (beside it a column of ones) of the rows whose waist is s. */
static void middle(const Call *call, const Plan *plan, int64_t rows, const float *s, float *h, float *a, float *z,
                   float *dots) {
    int64_t K = plan->K, M = plan->M, B = call->B;
    memset(z, 0, sizeof(float) * rows * (M + 1));
    if (B) {
        expand(rows, B, K, s, K, plan->Rd_table, B, call->down_bias, 0, h, B);
        act(call->activation, rows * B, h, a);
        memset(dots, 0, sizeof(float) * LANES * rows * M);
        dot(rows, B, M, a, B, plan->Lut, B, dots);
    }
    for (int64_t n = 0; n < rows; n++) {
        if (B)
            fold(M, dots + n * M * LANES, z + n * (M + 1));
        else
            memcpy(z + n * (M + 1), s + n * K, sizeof(float) * K);
        z[n * (M + 1) + M] = 1;
    }
}

static void forward_rows(const Call *call, const Plan *plan, int64_t thread, int64_t first, int64_t end) {
    int64_t I = call->I, O = call->O, K = plan->K, M = plan->M, shift = thread * plan->rows_size, ld, ldb;
    float *z = plan->z + shift, *dots = plan->dots + shift;
    float *tile = plan->tiles + shift, *other = tile + plan->step * COLUMNS;
    const void *base = call->residual_is_x ? call->x : call->residual;
    int64_t ld_base = call->residual_is_x ? call->ldx : call->ldr, bf16 = call->y_bf16;
    int64_t base_bf16 = call->residual_is_x ? call->x_bf16 : call->residual_bf16;
    for (int64_t row = first; row < end; row += plan->step) {
        int64_t rows = end - row < plan->step ? end - row : plan->step;
        float *s = call->waist + row * K;
        memset(dots, 0, sizeof(float) * LANES * rows * K);
        for (int64_t c = 0; c < I; c += COLUMNS) {
            int64_t cols = I - c < COLUMNS ? I - c : COLUMNS;
            const float *x = read_x(call, row, rows, c, cols, tile, other, &ld);
            dot(rows, cols, K, x, ld, plan->Lt + c, I, dots);
        }
        memset(s, 0, sizeof(float) * rows * K);
        fold(rows * K, dots, s);
        middle(call, plan, rows, s, plan->h + shift, plan->a + shift, z, dots);
        for (int64_t k = 0; k < rows * (M + 1); k++) z[k] *= call->scale;
        for (int64_t c = 0; c < O; c += COLUMNS) {
            int64_t cols = O - c < COLUMNS ? O - c : COLUMNS;
            const float *b = read(base, ld_base, base_bf16, row, rows, c, cols, other, &ldb);
            void *y = at(call->y, bf16, row * O + c);
            expand(rows, cols, M + !!call->up_bias, z, M + 1, plan->R + c, O, b, ldb, bf16 ? tile : y, bf16 ? cols : O);
            if (bf16) write_bf16(tile, rows, cols, y, O);
        }
    }
}

static void backward_rows(const Call *call, const Plan *plan, int64_t thread, int64_t first, int64_t end) {
    int64_t I = call->I, B = call->B, O = call->O, K = plan->K, M = plan->M, ld, ldb;
    int64_t shift = thread * plan->rows_size, sums = thread * plan->sums_size, needs = call->needs;
    float *h = plan->h + shift, *a = plan->a + shift, *z = plan->z + shift, *dz = plan->dz + shift;
    float *da = plan->da + shift, *ds = plan->ds + shift, *dots = plan->dots + shift, *tile = plan->tiles + shift;
    float *factors = tile + plan->step * COLUMNS, *base = factors + plan->step * COLUMNS;
    float *out = base + plan->step * COLUMNS;
    int64_t bf16 = call->x_bf16;
    float *dLt = plan->dLt + sums, *dRd = plan->dRd + sums, *dLut = plan->dLut + sums, *dbd = plan->dbd + sums;
    float *dR = plan->dR + sums;
    int needs_dR = (needs & (DUP | DUP_BIAS | DSCALE)) || (!B && needs & DDOWN);
    memset(dLt, 0, sizeof(float) * plan->sums_size);
    for (int64_t row = first; row < end; row += plan->step) {
        int64_t rows = end - row < plan->step ? end - row : plan->step;
        const float *s = call->waist + row * K;
        middle(call, plan, rows, s, h, a, z, dots);

        memset(dots, 0, sizeof(float) * LANES * rows * M);
        for (int64_t c = 0; c < O; c += COLUMNS) {
            int64_t cols = O - c < COLUMNS ? O - c : COLUMNS;
            const float *dy = read(call->dy, call->ldy, call->y_bf16, row, rows, c, cols, tile, &ld);
            if (needs & (DX | DDOWN | DDOWN_BIAS | DUP)) dot(rows, cols, M, dy, ld, plan->R + c, O, dots);
            if (needs_dR) outer(rows, cols, M + !!call->up_bias, z, M + 1, dy, ld, dR + c, O);
        }
        memset(dz, 0, sizeof(float) * rows * M);
        fold(rows * M, dots, dz);
        for (int64_t k = 0; k < rows * M; k++) dz[k] *= call->scale;
        if (B && needs & (DX | DDOWN | DDOWN_BIAS | DUP)) {
            outer(rows, B, M, dz, M, a, B, dLut, B);
            expand(rows, B, M, dz, M, plan->Lut, B, NULL, 0, da, B);
            act_grad(call->activation, rows * B, h, a, da);
            for (int64_t n = 0; n < rows; n++)
                for (int64_t b = 0; b < B; b++) dbd[b] += da[n * B + b];
            outer(rows, B, K, s, K, da, B, dRd, B);
            memset(dots, 0, sizeof(float) * LANES * rows * K);
            dot(rows, B, K, da, B, plan->Rd_table, B, dots);
            memset(ds, 0, sizeof(float) * rows * K);
            fold(rows * K, dots, ds);
        } else {
            memcpy(ds, dz, sizeof(float) * rows * K);
        }

        if (!(needs & (DX | DDOWN))) continue;
        for (int64_t c = 0; c < I; c += COLUMNS) {
            int64_t cols = I - c < COLUMNS ? I - c : COLUMNS;
            const float *x = read_x(call, row, rows, c, cols, tile, factors, &ld);
            if (needs & DDOWN) outer(rows, cols, K, ds, K, x, ld, dLt + c, I);
            if (!(needs & DX)) continue;
            const void *dy = call->residual_is_x ? call->dy : NULL;
            const float *b = read(dy, call->ldy, call->y_bf16, row, rows, c, cols, base, &ldb);
            void *dx = at(call->dx, bf16, row * I + c);
            float *to = bf16 ? out : dx;
            int64_t ld_to = bf16 ? cols : I;
            expand(rows, cols, K, ds, K, plan->Lt + c, I, call->dropout_p ? NULL : b, ldb, to, ld_to);
            if (call->dropout_p)
                for (int64_t n = 0; n < rows; n++)
                    for (int64_t k = 0; k < cols; k++)
                        to[n * ld_to + k] = to[n * ld_to + k] * factors[n * cols + k] + (b ? b[n * ldb + k] : 0);
            if (bf16) write_bf16(out, rows, cols, dx, I);
        }
    }
}

static void in_threads(void (*work)(const Call *, const Plan *, int64_t, int64_t, int64_t), const Call *call,
                       const Plan *plan) {
    int64_t blocks = (call->N + plan->step - 1) / plan->step, share = (blocks + plan->threads - 1) / plan->threads;
    if (plan->threads == 1) return work(call, plan, 0, 0, call->N);
#pragma omp parallel for num_threads(plan->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < plan->threads; thread++) {
        int64_t first = thread * share * plan->step, end = first + share * plan->step;
        work(call, plan, thread, first, end < call->N ? end : call->N);
    }
}

/* Ask for huge pages under an output, which may be fresh memory: the system clears them far faster than small ones. */
static void expect(const void *output, int64_t bf16, int64_t size) {
    const uintptr_t page = 1 << 21, start = ((uintptr_t)output + page - 1) & ~(page - 1);
    const uintptr_t end = (uintptr_t)at(output, bf16, size) & ~(page - 1);
    if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
}

/* Both return 0, or how many floats of room they need and have not got: then they have done nothing. */
int64_t loretta_forward(const Call *call) {
    Plan plan = plan_of(call, 0);
    if (plan.size > call->room_size) return plan.size;
    contract_sides(call, &plan);
    expect(call->y, call->y_bf16, call->N * call->O);
    in_threads(forward_rows, call, &plan);
    return 0;
}

int64_t loretta_backward(const Call *call) {
    Plan plan = plan_of(call, 1);
    if (plan.size > call->room_size) return plan.size;
    contract_sides(call, &plan);
    if (call->needs & DX) expect(call->dx, call->x_bf16, call->N * call->I);
    in_threads(backward_rows, call, &plan);
    for (int64_t thread = 1; thread < plan.threads; thread++)
        for (int64_t k = 0; k < plan.sums_size; k++) plan.dLt[k] += plan.dLt[thread * plan.sums_size + k];

    int64_t M = plan.M, O = call->O, B = call->B, needs = call->needs;
    if (needs & DSCALE) {
        double total = 0;
        for (int64_t k = 0; k < (M + !!call->up_bias) * O; k++) total += (double)plan.dR[k] * plan.R[k];
        *call->dscale = (float)total;
    }
    for (int64_t k = 0; k < (M + 1) * O; k++) plan.dR[k] *= call->scale;
    if (needs & DUP_BIAS) memcpy(call->dup_bias, plan.dR + M * O, sizeof(float) * O);
    if (needs & DDOWN_BIAS) memcpy(call->ddown_bias, plan.dbd, sizeof(float) * B);
    if (needs & DDOWN) {
        core_grads(&plan.Ld, plan.dLt, call->ddown, plan.back);
        core_grads(B ? &plan.Rd : &plan.Ru, B ? plan.dRd : plan.dR, call->ddown + side_params(&plan.Ld), plan.back);
    }
    if (needs & DUP) {
        core_grads(&plan.Lu, plan.dLut, call->dup, plan.back);
        core_grads(&plan.Ru, plan.dR, call->dup + side_params(&plan.Lu), plan.back);
    }
    return 0;
}
