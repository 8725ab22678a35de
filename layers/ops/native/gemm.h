/* Products of a packed matrix A with rows of vectors B: C[r][p] (+)= sum over k of A[r][k] B[k][p].
 *
 * The sum over k runs in the same order for every r and p, whatever block they fall into: results do not depend on how the pixels
 * are cut into tiles, bands and threads. */
#ifndef SURGEON_GEMM_H
#define SURGEON_GEMM_H

#include "lanes.h"

/* DEPTH: of k at a time; so many rows of VECTORS vectors of B stay in the first-level cache, or near it. PART_BYTES: of A meanwhile. */
enum { DEPTH = 224, PART_BYTES = 1 << 17 };

/* Of a pair of vectors, the lanes of both that come together: those where lane bit s is 0, and where it is 1. Written out, because
 * GCC makes a vector that it computes lane by lane anew at every use. */
#define LOW(i, s) ((i) & (s) ? (i) - (s) + LANES : (i))
#define HIGH(i, s) ((i) & (s) ? (i) + LANES : (i) + (s))
#define FOUR(F, i, s) F(i, s), F(i + 1, s), F(i + 2, s), F(i + 3, s)
#if LANES == 16
#define EVERY_LANE(F, s) {FOUR(F, 0, s), FOUR(F, 4, s), FOUR(F, 8, s), FOUR(F, 12, s)}
#elif LANES == 8
#define EVERY_LANE(F, s) {FOUR(F, 0, s), FOUR(F, 4, s)}
#else
#define EVERY_LANE(F, s) {FOUR(F, 0, s)}
#endif
static const ivec LOWS[4] = {EVERY_LANE(LOW, 1), EVERY_LANE(LOW, 2), EVERY_LANE(LOW, 4), EVERY_LANE(LOW, 8)};
static const ivec HIGHS[4] = {EVERY_LANE(HIGH, 1), EVERY_LANE(HIGH, 2), EVERY_LANE(HIGH, 4), EVERY_LANE(HIGH, 8)};

/* v[i][j] = v[j][i]. */
INLINE void turn(vec *v) {
    UNROLLED for (int bit = 0; 1 << bit < LANES; bit++) UNROLLED for (int i = 0; i < LANES; i++) if (!(i >> bit & 1)) {
        vec a = v[i], b = v[i + (1 << bit)];
#if defined(__clang__)
        for (int j = 0; j < LANES; j++) {
            int low = LOW(j, 1 << bit), high = HIGH(j, 1 << bit);
            v[i][j] = low < LANES ? a[low] : b[low - LANES];
            v[i + (1 << bit)][j] = high < LANES ? a[high] : b[high - LANES];
        }
#else
        v[i] = __builtin_shuffle(a, b, LOWS[bit]);
        v[i + (1 << bit)] = __builtin_shuffle(a, b, HIGHS[bit]);
#endif
    }
}

/* `h` rows of A from k = 0 on, k by k, as far as whole blocks of LANES × LANES may be read and written; returns how far. A vector has
 * more lanes than there are rows: the next one writes over the rest. */
static int64_t pack_blocks(const float *A, int64_t row, int64_t h, int64_t depth, float *to, const float *end) {
    int64_t k = 0;
    for (; k + LANES <= depth && to + (k + LANES - 1) * h + LANES <= end; k += LANES) {
        vec v[LANES];
        UNROLLED for (int i = 0; i < LANES; i++) v[i] = i < h ? load(A + i * row + k) : (vec){0};
        turn(v);
        UNROLLED for (int i = 0; i < LANES; i++) store(to + (k + i) * h, v[i]);
    }
    return k;
}

/* Rows of A (`rows` × `depth`, at distances row and k) in blocks of height even_part(rows, ROWS), in each k by k. */
static void pack(const float *A, int64_t row, int64_t k_step, int64_t rows, int64_t depth, float *to) {
    int64_t height = even_part(rows, ROWS);
    const float *end = to + rows * depth;
    for (int64_t r0 = 0; r0 < rows; r0 += height, A += height * row) {
        int64_t h = least(height, rows - r0), done = k_step == 1 && h <= LANES ? pack_blocks(A, row, h, depth, to, end) : 0;
        for (int64_t r = 0; r < h; r++)
            for (int64_t k = done; k < depth; k++) to[k * h + r] = A[r * row + k * k_step];
        to += h * depth;
    }
}

typedef struct {
    const float *b;
    int64_t b_k, b_vector; /* distances between rows, and between vectors of a row */
    float *c;
    int64_t c_row, c_vector;
} Operands; /* handed on by address: a copy as a whole would wait for what was just written to a part of it */

/* The sums of a block whose last vectors have fewer lanes. Apart, because sums do not stay in registers where a function is called. */
static __attribute__((noinline)) void keep_some(int rows, int vectors, const vec *sums, const Operands *at, int64_t last, int add) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++, sums++) {
            float *c = at->c + r * at->c_row + v * at->c_vector;
            int64_t lanes = v == vectors - 1 ? last : LANES;
            store_first(c, add ? *sums + load_first(c, lanes) : *sums, lanes);
        }
}

INLINE void block(const int rows, const int vectors, int64_t depth, const float *A, const Operands *at, int64_t last, int add) {
    const int64_t b_k = at->b_k, b_vector = at->b_vector, c_row = at->c_row, c_vector = at->c_vector;
    const float *b = at->b;
    float *c = at->c;
    vec sum[9][3];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = (vec){0};
    for (int64_t k = 0; k < depth; k++, A += rows, b += b_k) {
        vec x[3];
        UNROLLED for (int v = 0; v < vectors; v++) x[v] = held(load(b + v * b_vector));
        UNROLLED for (int r = 0; r < rows; r++) {
            vec a = held(splat(A[r]));
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = plus(sum[r][v], a, x[v]);
        }
    }
    if (last < LANES) {
        vec sums[9 * 3];
        UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sums[r * vectors + v] = sum[r][v];
        keep_some(rows, vectors, sums, at, last, add);
    } else
        UNROLLED for (int r = 0; r < rows; r++, c += c_row) UNROLLED for (int v = 0; v < vectors; v++)
            store(c + v * c_vector, add ? sum[r][v] + load(c + v * c_vector) : sum[r][v]);
}

/* Some blocks of rows, one below the other, `A_step` apart in A. */
static void blocks_of(int64_t rows, int64_t vectors, int64_t many, int64_t depth, const float *A, int64_t A_step, Operands at,
                      int64_t last, int add) {
#define CASE(R, V) \
    case R * 4 + V: \
        for (; many > 0; many--, A += A_step, at.c += R * at.c_row) block(R, V, depth, A, &at, last, add); \
        return;
#define CASES(R) CASE(R, 1) CASE(R, 2) CASE(R, 3)
    switch (rows * 4 + vectors) {
        CASES(1) CASES(2) CASES(3) CASES(4)
#if defined(__AVX512F__) || defined(__aarch64__)
        CASES(5) CASES(6) CASES(7) CASES(8) CASES(9)
#endif
    }
#undef CASES
#undef CASE
}

/* `count` vectors of a row, of the last only `last` lanes. The part of A that is multiplied with all of them before the next stays in
 * the second-level cache, that of B meanwhile in the first-level one. */
static void product(int64_t rows, int64_t count, int64_t depth, const float *packed, Operands at, int64_t last, int add) {
    int64_t height = even_part(rows, ROWS), groups = ceil_div(count, VECTORS), thick = even_part(depth, DEPTH);
    int64_t part = even_part(ceil_div(rows, height), most(1, PART_BYTES / (4 * thick * height))) * height;
    for (int64_t k = 0; k < depth; k += thick)
        for (int64_t r = 0; r < rows; r += part) {
            int64_t deep = least(thick, depth - k), here = least(part, rows - r), whole = here / height, rest = here % height;
            const float *A = packed + r * depth + k * height;
            for (int64_t g = 0; g < groups; g++) {
                int64_t v = count * g / groups, wide = count * (g + 1) / groups - v, lanes = v + wide == count ? last : LANES;
                Operands by = at;
                by.b += k * at.b_k + v * at.b_vector;
                by.c += r * at.c_row + v * at.c_vector;
                blocks_of(height, wide, whole, deep, A, height * depth, by, lanes, add || k);
                by.c += whole * height * at.c_row;
                if (rest) blocks_of(rest, wide, 1, deep, packed + (r + whole * height) * depth + k * rest, 0, by, lanes, add || k);
            }
        }
}

/* C (rows × columns) (+)= A B with contiguous rows of B and C at distances b_row and c_row. */
static void gemm(int64_t rows, int64_t columns, int64_t depth, const float *packed, const float *b, int64_t b_row, float *c,
                 int64_t c_row, int add) {
    int64_t count = ceil_div(columns, LANES);
    Operands at = {b, b_row, LANES, c, c_row, LANES};
    product(rows, count, depth, packed, at, columns - (count - 1) * LANES, add);
}

/* to[p][f] = from[f][p], LANES × LANES at a time; reads and writes whole blocks. */
static void transpose(const float *from, int64_t from_row, int64_t rows, int64_t columns, float *to, int64_t to_row) {
    for (int64_t f = 0; f < rows; f += LANES)
        for (int64_t p = 0; p < columns; p += LANES) {
            vec v[LANES];
            UNROLLED for (int i = 0; i < LANES; i++) v[i] = load(from + (f + i) * from_row + p);
            turn(v);
            UNROLLED for (int i = 0; i < LANES; i++) store(to + (p + i) * to_row + f, v[i]);
        }
}

#endif
