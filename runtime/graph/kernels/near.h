/* Queries and keys as a near window needs them, for one instruction set; see window.c for the angles.
 *
 * Two scores belong to a row and a cell, of which the distance of their positions chooses one before the weights are
 * computed: one softmax. A chunk of cells that is near to all rows, or far from them, costs one score as ever.
 *
 * Where a Hadamard transform lies behind the rotation, it is undone in near keys and queries, whose products stay the
 * same without it.
 */
#pragma once

#include "kernels.h"
#include "rotate.h"

enum { FAR = 1, NEAR = 2 }; /* sides; both: some of a chunk's cells are near to a token, and others are far from it */

/* The positions of a stream's cells, from `cell` on. */
INLINE const int32_t *positions_of(const struct attention *a, int64_t stream, int64_t cell) {
    return a->cell_positions + stream * a->stream_cells + cell;
}

INLINE int32_t row_position(const struct attention *a, int64_t stream, int64_t token) {
    return a->row_positions[stream * a->n_tokens + token];
}

/* The compiler turns these loops into vectors only if it is told to. */
#if defined(__GNUC__) && !defined(__clang__)
#define VECTORISED static __attribute__((noinline, optimize("O3")))
#else
#define VECTORISED static
#endif

VECTORISED int32_t least_of(const int32_t *x, int64_t n) {
    int32_t least = INT32_MAX;
    for (int64_t i = 0; i < n; i++)
        least = x[i] < least ? x[i] : least;
    return least;
}

VECTORISED int32_t greatest_of(const int32_t *x, int64_t n) {
    int32_t greatest = INT32_MIN;
    for (int64_t i = 0; i < n; i++)
        greatest = x[i] > greatest ? x[i] : greatest;
    return greatest;
}

/* Take the near scores of cells from position `first` on in place of the far ones. */
VECTORISED void choose_from(int32_t first, const int32_t *cells, const float *restrict near, float *restrict scores,
                            int64_t n) {
    for (int64_t i = 0; i < n; i++)
        scores[i] = cells[i] >= first ? near[i] : scores[i];
}

/* Note how far each token is from a chunk's `n` cells (0 where it sees none of them); what there is of all tokens. */
INLINE int32_t measure(const struct attention *a, const struct attention_piece *p, const int32_t *seen, int32_t *reach,
                       int64_t cell, int64_t n) {
    int32_t any = FAR, low = INT32_MAX, high = INT32_MIN;
    if (a->window) {
        const int32_t *cells = positions_of(a, p->stream, cell);
        any = 0;
        low = least_of(cells, n);
        high = greatest_of(cells, n);
    }
    for (int64_t t = 0; t < p->stop_token - p->first_token; t++) {
        int64_t row = a->window ? row_position(a, p->stream, p->first_token + t) : 0;
        reach[t] = !a->window ? FAR
                   : seen[t] == 0 ? 0
                   : row - low < a->window->tokens ? NEAR
                   : row - high >= a->window->tokens ? FAR
                                                     : FAR | NEAR;
        any |= reach[t];
    }
    return any;
}

/* Choose the near score where a cell is near to the row, in place of the far one. */
INLINE void choose(const struct attention *a, int64_t row, const int32_t *cells, const float *near, float *scores, int64_t n) {
    choose_from((int32_t)(row - a->window->tokens + 1), cells, near, scores, n);
}

/* Read a cell's key as the model was trained to see it. A cell that no row sees may be at any position. */
static void near_key(const struct attention *a, const char *cell, int32_t position, float *x) {
    const struct window *w = a->window;
    unpack(a->types, a->k->type, cell, x, a->k_size);
    if (a->hadamard)
        transform(x, a->k_size, a->hadamard);
    if (position >= 0 && position < w->n_turns)
        turn(x, w->turns + position * w->n_dims, w->n_dims, w->halves);
}

/* Write a query as it sees near keys, and as it sees far ones. */
static void two_queries(const struct attention *a, int64_t stream, int64_t token, const float *q, float scale, float *near,
                        float *far) {
    const struct window *w = a->window;
    for (int64_t i = 0; i < a->k_size; i++)
        near[i] = q[i] * scale;
    if (a->hadamard)
        transform(near, a->k_size, a->hadamard);
    memcpy(far, near, (size_t)a->k_size * 4);
    turn(near, w->turns + (int64_t)row_position(a, stream, token) * w->n_dims, w->n_dims, w->halves);
    turn(far, w->border, w->n_dims, w->halves);
    if (a->hadamard)
        transform(far, a->k_size, a->hadamard);
}
