/* ACDA: y = coeff * (atoms * x), the atoms alpha * psi of every pixel and the static ones; see acda_reference.py for the shapes.
 *
 * Lanes are pixels of a row of the output. A block of LANES pixels makes its atoms D [tap][atom][lane], which stay in the
 * first-level cache while they filter channel after channel into Z [channel * M + atom][pixel]; a tile of rows is then one matrix
 * product with the coefficients, straight into the output. A band of rows of an image has one padded copy of its input. */
#ifndef SURGEON_ACDA_H
#define SURGEON_ACDA_H

#include "gemm.h"
#include "window.h"

typedef struct {
    Window s;
    int64_t n, c, k, c_out, c_group, m, m_all, groups, taps;
    int64_t bands, band, tile; /* bands of an image, output rows of a band and of a tile */
    int64_t forward, backward; /* floats of scratch of a call */
    int64_t features;          /* of a group, rounded up: a row of the gradient of the coefficients */
} Acda;

typedef struct {
    const float *x, *alpha, *psi, *static_atoms, *coeff; /* psi and coeff packed, see acda_pack */
    float *y;
    const float *grad, *psi_back, *coeff_back;
    float *gx, *galpha, *gpsi, *gstatic, *gcoeff; /* null: not wanted; the last three are partial sums of the caller's */
} AcdaTensors;

enum { TILE_BYTES = 1 << 18, TILE_PIXELS = 160, CHUNK = 16 };

/* ---- one block of pixels ------------------------------------------------------------------------------------------------ */

typedef struct {
    const int64_t *place;
    const float *x;
    int64_t plane, taps, m_all;
    float *d;           /* [tap][atom][lane] */
    float *z;           /* [channel * M + atom][pixel]; its gradient: [channel][atom][lane] */
    int64_t z_row;
} Block;

INLINE void filter(const int channels, const int atoms, const Block *b, int64_t c0, int64_t m0) {
    vec sum[4][6];
    const float *x = b->x + c0 * b->plane, *d = b->d + m0 * LANES;
    const int64_t plane = b->plane, step = b->m_all * LANES;
    UNROLLED for (int c = 0; c < channels; c++) UNROLLED for (int m = 0; m < atoms; m++) sum[c][m] = (vec){0};
    for (int64_t t = 0; t < b->taps; t++, d += step) {
        const float *at = x + b->place[t];
        vec in[4];
        UNROLLED for (int c = 0; c < channels; c++) in[c] = held(load(at + c * plane));
        UNROLLED for (int m = 0; m < atoms; m++) {
            vec atom = held(load(d + m * LANES));
            UNROLLED for (int c = 0; c < channels; c++) sum[c][m] = plus(sum[c][m], atom, in[c]);
        }
    }
    UNROLLED for (int c = 0; c < channels; c++) UNROLLED for (int m = 0; m < atoms; m++)
        store(b->z + ((c0 + c) * b->m_all + m0 + m) * b->z_row, sum[c][m]);
}

/* gx[c][p + t] += sum over atoms of d[t][m] gz[c][m], for the taps of column v. Columns come outside of everything: a sum must have
 * been stored long before its neighbor, which overlaps it, is loaded. */
INLINE void spread(const int channels, const int atoms, const Block *b, int64_t c0, int64_t m0, int64_t v, int64_t lw, float *gx) {
    vec gz[4][6];
    const int64_t *place = b->place, plane = b->plane, taps = b->taps;
    const int64_t step = lw * b->m_all * LANES; /* read once: to the compiler a store may change *b */
    const float *d = b->d + (v * b->m_all + m0) * LANES;
    gx += c0 * plane;
    UNROLLED for (int c = 0; c < channels; c++) UNROLLED for (int m = 0; m < atoms; m++)
        gz[c][m] = held(load(b->z + ((c0 + c) * b->m_all + m0 + m) * LANES));
    for (int64_t t = v; t < taps; t += lw, d += step) {
        float *at = gx + place[t];
        vec sum[4];
        UNROLLED for (int c = 0; c < channels; c++) sum[c] = load(at + c * plane);
        UNROLLED for (int m = 0; m < atoms; m++) {
            vec atom = held(load(d + m * LANES));
            UNROLLED for (int c = 0; c < channels; c++) sum[c] = plus(sum[c], atom, gz[c][m]);
        }
        UNROLLED for (int c = 0; c < channels; c++) store(at + c * plane, sum[c]);
    }
}

/* gd[t][m] += sum over channels of gz[c][m] x[c][p + t], `taps` taps from t0. */
INLINE void atom_gradient(const int taps, const int atoms, const Block *b, int64_t t0, int64_t m0, int64_t channels, float *gd) {
    vec sum[4][6];
    const float *x[4], *z = b->z + m0 * LANES;
    const int64_t step = b->m_all * LANES;
    gd += (t0 * b->m_all + m0) * LANES;
    UNROLLED for (int t = 0; t < taps; t++) {
        x[t] = b->x + b->place[t0 + t];
        UNROLLED for (int m = 0; m < atoms; m++) sum[t][m] = load(gd + t * step + m * LANES);
    }
    for (int64_t c = 0, at = 0; c < channels; c++, at += b->plane, z += step) {
        vec in[4];
        UNROLLED for (int t = 0; t < taps; t++) in[t] = held(load(x[t] + at));
        UNROLLED for (int m = 0; m < atoms; m++) {
            vec gz = held(load(z + m * LANES));
            UNROLLED for (int t = 0; t < taps; t++) sum[t][m] = plus(sum[t][m], gz, in[t]);
        }
    }
    UNROLLED for (int t = 0; t < taps; t++) UNROLLED for (int m = 0; m < atoms; m++) store(gd + t * step + m * LANES, sum[t][m]);
}

/* Call a function above for every channel (or tap) and atom, in blocks that fit the registers. */
#define SWITCH(CALL, ATOMS_HERE, WIDTH)                                                                                     \
    switch (ATOMS_HERE) {                                                                                                  \
        case 1: CALL(WIDTH, 1); break;                                                                                     \
        case 2: CALL(WIDTH, 2); break;                                                                                     \
        case 3: CALL(WIDTH, 3); break;                                                                                     \
        case 4: CALL(WIDTH, 4); break;                                                                                     \
        case 5: CALL(WIDTH, 5); break;                                                                                     \
        default: CALL(WIDTH, 6);                                                                                           \
    }
#define EVERY(COUNT, M_ALL, CALL)                                                                                          \
    for (int64_t m0 = 0, part = even_part(M_ALL, ATOMS); m0 < (M_ALL); m0 += part) {                                       \
        int64_t here = least(part, (M_ALL) - m0), at = 0;                                                                  \
        for (; at + CHANNELS <= (COUNT); at += CHANNELS) SWITCH(CALL, here, CHANNELS)                                      \
        for (; at < (COUNT); at++) SWITCH(CALL, here, 1)                                                                   \
    }

static void filter_all(const Block *b, int64_t channels) {
#define CALL(WIDTH, HERE) filter(WIDTH, HERE, b, at, m0)
    EVERY(channels, b->m_all, CALL)
#undef CALL
}

static void spread_all(const Block *b, int64_t channels, int64_t lw, float *gx) {
    for (int64_t v = 0; v < lw; v++) {
#define CALL(WIDTH, HERE) spread(WIDTH, HERE, b, at, m0, v, lw, gx)
        EVERY(channels, b->m_all, CALL)
#undef CALL
    }
}

static void atom_gradients(const Block *b, int64_t channels, float *gd) {
#define CALL(WIDTH, HERE) atom_gradient(WIDTH, HERE, b, at, m0, channels, gd)
    EVERY(b->taps, b->m_all, CALL)
#undef CALL
}

/* ---- tiles and bands ---------------------------------------------------------------------------------------------------- */

typedef struct {
    float *x, *gx, *alpha, *galpha, *d, *gd, *z, *gz, *chunk, *zt, *grad, *packed;
    int64_t *place;
} AcdaScratch;

static int64_t tile_row(const Acda *a) { return spaced(a->tile * a->s.ow); }

/* Lays out the scratch from `at`, and returns what it takes in floats. */
static int64_t acda_layout(const Acda *a, float *at, int backward, AcdaScratch *w) {
    float *next = at;
    int64_t row = tile_row(a), image = padded_floats(padded(&a->s, 0, a->band), a->c), block = a->taps * a->m_all * LANES;
    w->place = (int64_t *)take(&next, 2 * a->taps);
    w->x = take(&next, image);
    w->alpha = take(&next, a->m * a->k * row);
    w->d = take(&next, block);
    w->z = take(&next, (a->c * a->m_all + 16) * row);
    if (backward) {
        w->gx = take(&next, image);
        w->galpha = take(&next, a->m * a->k * row);
        w->gd = take(&next, block);
        w->gz = take(&next, a->c * a->m_all * row);
        w->chunk = take(&next, CHUNK * a->m_all * LANES);
        w->zt = take(&next, (a->features + 16) * row);
        w->grad = take(&next, a->c_out * row);
        w->packed = take(&next, a->c_out * row);
    }
    return next - at;
}

/* Rows of pixels p0 to p0 + count of maps of `size` pixels, at distance `row`; zero behind. */
static void load_tile(const float *from, int64_t maps, int64_t size, int64_t count, float *to, int64_t row) {
    copy_rows(from, size, maps, count, to, row, 0);
    for (int64_t i = 0; i < maps; i++) memset(to + i * row + count, 0, (size_t)(row - count) * 4);
}

static void fill_static(const Acda *a, const float *atoms, float *d) {
    for (int64_t r = 0; r < a->m_all - a->m; r++)
        for (int64_t t = 0; t < a->taps; t++) store(d + (t * a->m_all + a->m + r) * LANES, splat(atoms[r * a->taps + t]));
}

/* The dynamic atoms of LANES pixels, d[t][m] = psi[t] alpha[m]. */
static void make_atoms(const Acda *a, const float *psi, const float *alpha, int64_t row, float *d) {
    Operands at = {alpha, row, a->k * row, d, a->m_all * LANES, LANES};
    if (a->m) product(a->taps, a->m, a->k, psi, at, LANES, 0);
}

static Block block_at(const Acda *a, const AcdaScratch *w, Padded p, int64_t i, int64_t j) {
    return (Block){w->place, w->x + i * a->s.sh * p.row + j, p.plane, a->taps, a->m_all, w->d, NULL, tile_row(a)};
}

static void acda_forward_band(const Acda *a, const AcdaTensors *t, float *scratch, int64_t n, int64_t b) {
    AcdaScratch w;
    acda_layout(a, scratch, 0, &w);
    int64_t i0 = b * a->band, i1 = least(i0 + a->band, a->s.oh), pixels = a->s.oh * a->s.ow, row = tile_row(a);
    int64_t outputs = a->c_out / a->groups, depth = a->c_group * a->m_all;
    Padded p = padded(&a->s, i0, i1);
    tap_places(&a->s, p, w.place);
    window_copy(&a->s, p, a->c, t->x + n * a->c * a->s.h * a->s.w, w.x);
    fill_static(a, t->static_atoms, w.d);
    for (int64_t first = i0; first < i1; first += a->tile) {
        int64_t end = least(first + a->tile, i1), count = (end - first) * a->s.ow, start = first * a->s.ow;
        load_tile(t->alpha + n * a->m * a->k * pixels + start, a->m * a->k, pixels, count, w.alpha, row);
        for (int64_t i = first; i < end; i++)
            for (int64_t j = 0; j < a->s.ow; j += LANES) {
                int64_t q = (i - first) * a->s.ow + j;
                Block block = block_at(a, &w, p, i - i0, j);
                block.z = w.z + q;
                make_atoms(a, t->psi, w.alpha + q, row, w.d);
                filter_all(&block, a->c);
            }
        for (int64_t g = 0; g < a->groups; g++)
            gemm(outputs, count, depth, t->coeff + g * outputs * depth, w.z + g * depth * row, row,
                 t->y + (n * a->c_out + g * outputs) * pixels + start, pixels, 0);
    }
}

/* gcoeff[o][f] += sum over the tile's pixels of grad[o][p] z[f][p]. */
static void coeff_gradient(const Acda *a, const AcdaScratch *w, int64_t count, float *gcoeff) {
    int64_t row = tile_row(a), outputs = a->c_out / a->groups, depth = a->c_group * a->m_all, wide = a->features + 16;
    for (int64_t g = 0; g < a->groups; g++) {
        transpose(w->z + g * depth * row, row, depth, count, w->zt, wide);
        pack(w->grad + g * outputs * row, row, 1, outputs, count, w->packed);
        gemm(outputs, a->features, count, w->packed, w->zt, wide, gcoeff + g * outputs * a->features, a->features, 1);
    }
}

/* What the gradient of a block's atoms gives to psi and to the static atoms, lane by lane: of the first `lanes`, since the others'
 * inputs and coefficients, which may be NaN, are of no pixel here. */
static void basis_gradients(const Acda *a, const AcdaTensors *t, const float *alpha, int64_t row, const float *gd, int64_t lanes) {
    for (int64_t k = 0; t->gpsi && k < a->k; k++)
        for (int64_t tap = 0; tap < a->taps; tap++) {
            float *at = t->gpsi + (k * a->taps + tap) * LANES;
            vec sum = {0};
            for (int64_t m = 0; m < a->m; m++)
                sum = plus(sum, load(alpha + (m * a->k + k) * row), load(gd + (tap * a->m_all + m) * LANES));
            store(at, load(at) + first_lanes(sum, lanes));
        }
    for (int64_t r = 0; t->gstatic && r < a->m_all - a->m; r++)
        for (int64_t tap = 0; tap < a->taps; tap++) {
            float *at = t->gstatic + (r * a->taps + tap) * LANES;
            store(at, load(at) + first_lanes(load(gd + (tap * a->m_all + a->m + r) * LANES), lanes));
        }
}

static void backward_block(const Acda *a, const AcdaTensors *t, const AcdaScratch *w, Block block, int64_t q, int64_t lanes) {
    int64_t row = tile_row(a), size = a->taps * a->m_all;
    if (t->gx || t->gcoeff) {
        make_atoms(a, t->psi, w->alpha + q, row, w->d);
        fill_static(a, t->static_atoms, w->d);
    }
    if (t->gcoeff) {
        block.z = w->z + q;
        filter_all(&block, a->c);
    }
    const int atoms = t->galpha || t->gpsi || t->gstatic;
    if (t->gx && lanes < LANES)
        for (int64_t i = 0; i < size; i++) store(w->d + i * LANES, first_lanes(load(w->d + i * LANES), lanes));
    if (atoms) memset(w->gd, 0, (size_t)(size * LANES) * 4);
    const float *x = block.x;
    for (int64_t c = 0; c < a->c && (t->gx || atoms); c += CHUNK) { /* what a chunk needs stays in the first-level cache */
        int64_t channels = least(CHUNK, a->c - c);
        const float *gz = w->gz + c * a->m_all * row + q;
        for (int64_t i = 0; i < channels * a->m_all; i++) store(w->chunk + i * LANES, first_lanes(load(gz + i * row), lanes));
        block.z = w->chunk;
        block.x = x + c * block.plane;
        if (t->gx) spread_all(&block, channels, a->s.lw, w->gx + (block.x - w->x));
        if (atoms) atom_gradients(&block, channels, w->gd);
    }
    if (atoms) {
        Operands at = {w->gd, a->m_all * LANES, LANES, w->galpha + q, row, a->k * row};
        if (t->galpha && a->m) product(a->k, a->m, a->taps, t->psi_back, at, LANES, 0);
        basis_gradients(a, t, w->alpha + q, row, w->gd, lanes);
    }
}

static void acda_backward_band(const Acda *a, const AcdaTensors *t, float *scratch, int64_t n, int64_t b) {
    AcdaScratch w;
    acda_layout(a, scratch, 1, &w);
    int64_t i0 = b * a->band, i1 = least(i0 + a->band, a->s.oh), pixels = a->s.oh * a->s.ow, row = tile_row(a);
    int64_t outputs = a->c_out / a->groups, depth = a->c_group * a->m_all, image = a->c * a->s.h * a->s.w;
    Padded p = padded(&a->s, i0, i1);
    tap_places(&a->s, p, w.place);
    window_copy(&a->s, p, a->c, t->x + n * image, w.x);
    if (t->gx) memset(w.gx, 0, (size_t)padded_floats(p, a->c) * 4);
    for (int64_t first = i0; first < i1; first += a->tile) {
        int64_t end = least(first + a->tile, i1), count = (end - first) * a->s.ow, start = first * a->s.ow;
        load_tile(t->alpha + n * a->m * a->k * pixels + start, a->m * a->k, pixels, count, w.alpha, row);
        load_tile(t->grad + n * a->c_out * pixels + start, a->c_out, pixels, count, w.grad, row);
        for (int64_t g = 0; g < a->groups && (t->gx || t->galpha || t->gpsi || t->gstatic); g++)
            gemm(depth, count, outputs, t->coeff_back + g * outputs * depth, w.grad + g * outputs * row, row,
                 w.gz + g * depth * row, row, 0);
        for (int64_t i = first; i < end; i++)
            for (int64_t j = 0; j < a->s.ow; j += LANES)
                backward_block(a, t, &w, block_at(a, &w, p, i - i0, j), (i - first) * a->s.ow + j, least(LANES, a->s.ow - j));
        if (t->galpha)
            copy_rows(w.galpha, row, a->m * a->k, count, t->galpha + n * a->m * a->k * pixels + start, pixels, 1);
        if (t->gcoeff) coeff_gradient(a, &w, count, t->gcoeff);
    }
    if (t->gx) window_add(&a->s, p, a->c, w.gx, t->gx + n * image);
}

/* ---- what Python calls ---------------------------------------------------------------------------------------------------- */

/* Fills in what follows from the sizes: taps, bands, tiles and scratch. Of the shapes only, not of the number of threads. */
void acda_plan(Acda *a) {
    const Window *s = &a->s;
    AcdaScratch unused;
    a->taps = s->lh * s->lw;
    a->features = round_up(a->c_group * a->m_all);
    cut_bands(s, a->n, a->c, &a->band, &a->bands);
    int64_t rows = most(1, most(TILE_PIXELS / s->ow, TILE_BYTES / (4 * s->ow * (a->c * a->m_all + 1))));
    a->tile = even_part(a->band, rows);
    a->forward = acda_layout(a, NULL, 0, &unused);
    a->backward = acda_layout(a, NULL, 1, &unused);
}

/* coeff (C_out, F) and psi (K, taps), each packed for both directions. */
void acda_pack(const Acda *a, const float *coeff, const float *psi, float *coeff_on, float *psi_on, float *coeff_back,
               float *psi_back) {
    int64_t outputs = a->c_out / a->groups, depth = a->c_group * a->m_all, size = outputs * depth;
    for (int64_t g = 0; g < a->groups; g++) {
        if (coeff_on) pack(coeff + g * size, depth, 1, outputs, depth, coeff_on + g * size);
        if (coeff_back) pack(coeff + g * size, 1, depth, depth, outputs, coeff_back + g * size);
    }
    if (psi_on) pack(psi, 1, a->taps, a->taps, a->k, psi_on);
    if (psi_back) pack(psi, a->taps, 1, a->k, a->taps, psi_back);
}

void acda_forward(const Acda *a, const AcdaTensors *t, float *scratch, int64_t task) {
    acda_forward_band(a, t, scratch, task / a->bands, task % a->bands);
}

/* Tasks from `first` to `end` whose band is even (odd: 1): those share no row of the gradient of x. */
void acda_backward(const Acda *a, const AcdaTensors *t, float *scratch, int64_t first, int64_t end, int64_t odd) {
    for (int64_t task = first; task < end; task++)
        if (task % a->bands % 2 == odd) acda_backward_band(a, t, scratch, task / a->bands, task % a->bands);
}

#endif
