/* Cached keys rotated from some factors to others, when a sequence moves to another band.
 *
 * A piece is some cells in all layers, which share the cosines and sines of their angles. An angle is the difference of
 * the two that ggml's ROPE computes in floats for the same position: a key then comes out as if it had been rotated by the
 * new factors from the first, with what ggml rounds.
 */
#include "kernels.h"

#include <stdlib.h>

enum { PIECE_CELLS = 32 };

static const struct rotation_run *run_at(const struct rotation *r, int64_t cell) {
    for (int64_t i = 0; i < r->n_runs; i++)
        if (cell >= r->runs[i].start && cell < r->runs[i].stop)
            return &r->runs[i];
    return NULL;
}

/* Write the cosines and sines for the key at a position: see `rotate_neighbours` and `rotate_halves`. */
static void fill(const struct rotation *r, const struct rotation_run *run, int64_t position, float *table) {
    int64_t n = r->n_dims, half = n / 2;
    float theta = (float)position, theta_scale = powf(r->freq_base, -2.0f / (float)n);
    for (int64_t i = 0; i < half; i++, theta *= theta_scale) {
        double angle = run ? (double)(theta / run->after[i]) - (double)(theta / run->before[i]) : 0.0;
        float cosine = (float)(cos(angle) * r->scale), sine = (float)(sin(angle) * r->scale);
        int64_t first = r->halves ? i : 2 * i, second = r->halves ? half + i : 2 * i + 1;
        table[first] = table[second] = cosine;
        table[n + first] = -sine;
        table[n + second] = sine;
    }
}

static void rotate_piece(const struct context *context, const struct rotation *r, int64_t first, float *tables, float *x) {
    bool moves[PIECE_CELLS];
    int64_t n = r->stop - first < PIECE_CELLS ? r->stop - first : PIECE_CELLS, size = 2 * r->n_dims;
    for (int64_t i = 0; i < n; i++) {
        const struct rotation_run *run = run_at(r, first + i);
        moves[i] = run != NULL || r->scale != 1.0f;
        if (moves[i])
            fill(r, run, first + i, tables + i * size);
    }
    for (int64_t layer = 0; layer < r->n_caches; layer++) {
        const struct key_cache *cache = &r->caches[layer];
        for (int64_t i = 0; i < n; i++)
            if (moves[i])
                context->instructions->rotate_row(context->types, r, cache, tables + i * size,
                                                  cache->data + (first + i) * cache->cell_bytes, x);
    }
}

/* Whether the keys of a cache can be read, rotated and written. */
EXPORT bool ropewalk_can_rotate(const struct context *context, const struct key_cache *cache, int64_t n_dims) {
    int type = cache->type, hadamard = cache->hadamard;
    if (n_dims < 2 || n_dims % 2 != 0 || n_dims > cache->head_size || cache->n_heads < 1)
        return false;
    if (hadamard && (hadamard < 16 || (hadamard & (hadamard - 1)) != 0 || cache->head_size % hadamard != 0))
        return false;
    if (type < 0 || type >= N_TYPES || context->types[type].block == 0)
        return false;
    const struct block_type *kind = &context->types[type];
    bool reads = kind->block == 1 || kind->dequantise != NULL, writes = type == TYPE_F32 || kind->quantise != NULL;
    return reads && writes && cache->head_size % kind->block == 0;
}

/* Rotate cells until none is left to claim; called at once by as many threads as are to do so. False without memory. */
EXPORT bool ropewalk_rotate(const struct context *context, struct rotation *r) {
    int64_t floats = PIECE_CELLS * 2 * r->n_dims, first, longest = 0;
    for (int64_t i = 0; i < r->n_caches; i++) {
        int64_t row = r->caches[i].n_heads * r->caches[i].head_size;
        longest = row > longest ? row : longest;
    }
    float *scratch = aligned_alloc(64, (size_t)((floats + longest) * 4 + 63) / 64 * 64);
    if (scratch == NULL)
        return false;
    while ((first = atomic_fetch_add(&r->next, PIECE_CELLS)) < r->stop)
        rotate_piece(context, r, first, scratch, scratch + floats);
    free(scratch);
    return true;
}
