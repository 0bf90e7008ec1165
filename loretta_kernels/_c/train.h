/* The two sides of a tensor train, and the way back from their gradients to those of its cores.
 *
 *     W = L · R      Lt [K, I] the transpose of the product of the input cores      R [K, O] that of the output cores
 *
 * Each side is contracted from its last core to its first, so that the long index comes last. With G_j [r, n, r'] the
 * cores of a side and C the rank of its last bond (K for the input side, 1 for the output side):
 *
 *     T_j [r, C, n, rest] = sum over r' of G_j[r, n, r'] · T_(j+1) [r', C, rest],      T after the last = identity
 *
 * T of the first core is Lt, or R.
 */

typedef struct {
    int64_t cores, C;      /* how many; the rank of the last bond */
    const int64_t *n, *r;  /* the cores' modes, and the ranks before and behind them */
    const float *G;        /* the first core; the others follow it */
    float *T, *partials;   /* T of the first core; of the others, one behind the other */
} Side;

INLINE int64_t core_size(const Side *side, int64_t j) { return side->r[j] * side->n[j] * side->r[j + 1]; }

static int64_t side_params(const Side *side) {
    int64_t size = 0;
    for (int64_t j = 0; j < side->cores; j++) size += core_size(side, j);
    return size;
}

/* The product of the modes from core j on. */
static int64_t side_length(const Side *side, int64_t j) {
    int64_t length = 1;
    for (; j < side->cores; j++) length *= side->n[j];
    return length;
}

static int64_t t_size(const Side *side, int64_t j) { return side->r[j] * side->C * side_length(side, j); }

/* What T of the cores after the first takes, and so do their gradients. */
static int64_t partials_size(const Side *side) {
    int64_t size = 0;
    for (int64_t j = 1; j < side->cores; j++) size += t_size(side, j);
    return size;
}

/* T of core j. */
static float *t_of(const Side *side, int64_t j) {
    float *T = j ? side->partials : side->T;
    for (int64_t k = 1; k < j; k++) T += t_size(side, k);
    return T;
}

/* Fill T of all cores. */
static void contract(const Side *side) {
    const float *core = side->G + side_params(side);
    for (int64_t j = side->cores - 1; j >= 0; j--) {
        int64_t r = side->r[j], n = side->n[j], next = side->r[j + 1], C = side->C;
        float *T = t_of(side, j);
        core -= core_size(side, j);
        if (j == side->cores - 1) {
            for (int64_t b = 0; b < r; b++)
                for (int64_t c = 0; c < C; c++)
                    for (int64_t i = 0; i < n; i++) T[(b * C + c) * n + i] = core[(b * n + i) * C + c];
            continue;
        }
        int64_t rest = side_length(side, j + 1);
        const float *next_T = t_of(side, j + 1);
        for (int64_t b = 0; b < r; b++)
            for (int64_t c = 0; c < C; c++)
                expand(n, rest, next, core + b * n * next, next, next_T + c * rest, C * rest, NULL, 0,
                       T + (b * C + c) * n * rest, rest);
    }
}

/* What core_grads takes: the gradients of partials, and sums for a core's. */
static int64_t back_size(const Side *side) {
    int64_t most = 0;
    for (int64_t j = 0; j < side->cores; j++) most = core_size(side, j) > most ? core_size(side, j) : most;
    return partials_size(side) + most * LANES;
}

/* dG, the gradient of the side's cores, from that of T of the first core. */
static void core_grads(const Side *side, const float *dT, float *dG, float *room) {
    const float *core = side->G;
    float *sums = room + partials_size(side);
    for (int64_t j = 0; j < side->cores; j++) {
        int64_t r = side->r[j], n = side->n[j], next = side->r[j + 1], C = side->C;
        if (j == side->cores - 1) {
            for (int64_t b = 0; b < r; b++)
                for (int64_t i = 0; i < n; i++)
                    for (int64_t c = 0; c < C; c++) dG[(b * n + i) * C + c] = dT[(b * C + c) * n + i];
            return;
        }
        int64_t rest = side_length(side, j + 1);
        const float *next_T = t_of(side, j + 1);
        float *next_dT = room;
        room += t_size(side, j + 1);
        memset(next_dT, 0, sizeof(float) * t_size(side, j + 1));
        memset(dG, 0, sizeof(float) * core_size(side, j));
        memset(sums, 0, sizeof(float) * LANES * core_size(side, j));
        for (int64_t b = 0; b < r; b++)
            for (int64_t c = 0; c < C; c++) {
                const float *d = dT + (b * C + c) * n * rest;
                dot(n, rest, next, d, rest, next_T + c * rest, C * rest, sums + b * n * next * LANES);
                outer(n, rest, next, core + b * n * next, next, d, rest, next_dT + c * rest, C * rest);
            }
        fold(core_size(side, j), sums, dG);
        core += core_size(side, j), dG += core_size(side, j), dT = next_dT;
    }
}
