/* Cached keys rotated from some factors to others, when a sequence moves to another band.
 *
 * A piece is some cells in all layers, which share the turns of their positions.
 */
#include "kernels.h"
#include "turns.h"

#include <stdlib.h>

enum { PIECE_CELLS = 32 };

static const struct rotation_run *run_at(const struct rotation *r, int64_t cell) {
    for (int64_t i = 0; i < r->n_runs; i++)
        if (cell >= r->runs[i].start && cell < r->runs[i].stop)
            return &r->runs[i];
    return NULL;
}

static void fill(const struct rotation *r, const struct rotation_run *run, int64_t position, float *turns) {
    float theta = (float)position, theta_scale = powf(r->freq_base, -2.0f / (float)r->n_dims);
    for (int64_t i = 0; i < r->n_dims / 2; i++, theta *= theta_scale)
        put_turn(turns, r->n_dims / 2, r->halves, i, run ? angle_between(theta, run->before[i], run->after[i]) : 0.0, r->scale);
}

static void rotate_piece(const struct context *context, const struct rotation *r, int64_t first, float *turns, float *x) {
    bool moves[PIECE_CELLS];
    int64_t n = r->stop - first < PIECE_CELLS ? r->stop - first : PIECE_CELLS, size = r->n_dims;
    for (int64_t i = 0; i < n; i++) {
        const struct rotation_run *run = run_at(r, first + i);
        moves[i] = run != NULL || r->scale != 1.0f;
        if (moves[i])
            fill(r, run, first + i, turns + i * size);
    }
    for (int64_t layer = 0; layer < r->n_caches; layer++) {
        const struct key_cache *cache = &r->caches[layer];
        for (int64_t i = 0; i < n; i++)
            if (moves[i])
                context->instructions->rotate_row(context->types, r, cache, turns + i * size,
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
    int64_t floats = PIECE_CELLS * r->n_dims, first, longest = 0;
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
