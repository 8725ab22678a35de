/* A vector of floats as wide as the target's registers, by the vector extensions that GCC and Clang share.
 *
 * Wider types than the target has are split and spilled, and several times slower. */
#ifndef SURGEON_LANES_H
#define SURGEON_LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4 /* SSE, NEON */
#endif

/* How many sums a loop can hold in registers, beside what it multiplies: rows and vectors of a matrix product, atoms and channels of an atom convolution. */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 9, VECTORS = 3, ATOMS = 6, CHANNELS = 4 };
#else
enum { ROWS = 4, VECTORS = 3, ATOMS = 6, CHANNELS = 2 };
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float vec_anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return (vec) * (const vec_anywhere *)p; }
INLINE void store(float *p, vec v) { *(vec_anywhere *)p = (vec_anywhere)v; }
INLINE vec splat(float a) { return a - (vec){0}; } /* not plus, which would make 0 of -0, and an addition of a copy */

/* sum + a b, rounded once where the target can: by its instruction, because for some CPUs GCC makes it of some of the loops only, and
 * the same sums would have other bits in blocks of another size. */
INLINE vec plus(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) && LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

/* v in a register: of a value that several products share, GCC would make a memory operand for each, and loads, of which there are
 * two a cycle, would then take longer than the products. */
INLINE vec held(vec v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__SSE__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
    return v;
}

/* The first n lanes of v, zero in the others, whatever is there (NaN too). */
INLINE vec first_lanes(vec v, int64_t n) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return (vec)((ivec)v & (lane < (ivec){0} + (int32_t)n));
}

INLINE vec load_first(const float *p, int64_t lanes) {
    vec v = {0};
    if (lanes >= LANES) return load(p);
    memcpy(&v, p, (size_t)lanes * 4);
    return v;
}

INLINE void store_first(float *p, vec v, int64_t n) {
    if (n >= LANES)
        store(p, v);
    else
        memcpy(p, &v, (size_t)n * 4);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up_to(int64_t a, int64_t part) { return ceil_div(a, part) * part; }
INLINE int64_t round_up(int64_t a) { return ceil_div(a, 16) * 16; } /* floats: whole cache lines, whatever LANES is */

/* The distance of rows of n floats, and a vector's more: an odd number of cache lines, so that a column of many rows has all of the
 * cache's sets, not one in eight. */
INLINE int64_t spaced(int64_t n) { return ((ceil_div(n, 16) + 1) | 1) * 16; }

/* Into how large parts to cut `n` so that they are at most `limit` and nearly equal. */
INLINE int64_t even_part(int64_t n, int64_t limit) { return ceil_div(n, ceil_div(n, limit)); }

/* Copies a row: calls of memcpy would take longer than short ones do. */
INLINE void copy_floats(float *to, const float *from, int64_t n) {
    for (int64_t j = 0; j < n && n >= LANES; j += LANES) {
        j = least(j, n - LANES); /* the last vector overlaps the one before */
        store(to + j, load(from + j));
    }
    if (n >= LANES) return;
    if (n >= 8) {
        memcpy(to, from, 8 * 4);
        memcpy(to + n - 8, from + n - 8, 8 * 4);
    } else if (n >= 4) {
        memcpy(to, from, 4 * 4);
        memcpy(to + n - 4, from + n - 4, 4 * 4);
    } else
        for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

enum { LINE = 16, ROWS_AHEAD = 3 }; /* floats of a cache line; how many short rows before its turn one is asked for */

/* Has memory bring a cache line into the second-level cache: more of them can be on their way than into the first. */
INLINE void far(const float *p) { __builtin_prefetch(p, 0, 2); }

/* Has memory bring n floats. */
INLINE void ask_for(const float *p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(p + i);
}

/* Copies rows that lie far apart, here or (away) there: too short for the hardware to foresee the next ones, so those are asked for. */
static void copy_rows(const float *from, int64_t from_row, int64_t rows, int64_t count, float *to, int64_t to_row, int away) {
    for (int64_t r = 0; r < rows; r++, from += from_row) {
        if (r + ROWS_AHEAD < rows && !away) ask_for(from + ROWS_AHEAD * from_row, count);
        for (int64_t q = 0; q < count && r + ROWS_AHEAD < rows && away; q += LINE)
            __builtin_prefetch(to + (r + ROWS_AHEAD) * to_row + q, 1); /* to be written */
        copy_floats(to + r * to_row, from, count);
    }
}

/* Floats from a scratch buffer, one block after another, each from the start of a cache line. */
INLINE float *take(float **scratch, int64_t floats) {
    float *block = *scratch;
    *scratch += round_up(floats) + 16; /* loads of whole vectors may reach beyond the end */
    return block;
}

#endif
