/* Attention of a few query rows, straight from the cells, for one instruction set.
 *
 * With few rows, packing a cell into panels is more work than using it. Here K's values are multiplied by the queries as
 * they lie, and V's become floats in registers; the scales of blocks are multiplied into scores and weights. The cells
 * of a chunk are prefetched while those of the chunk before are used: a place at a time, as a core waits for some twenty
 * lines of memory at once, and stands still if it is to wait for more.
 */
#pragma once

#include "attend.h"

enum { FEW_CHUNK = 256 };         /* most cells at a time */
enum { FEW_BYTES = 160 << 10 };   /* of K and V at a time, for all heads: as many again are on their way */
enum { SLICE = VL == 16 ? 2 : 1 }; /* blocks of 32 values of V whose sums stay in registers, with all rows of a strip */
enum { FEW_STRIP = VL == 16 ? 6 : 3 };
enum { PARTS = 32 / VL }; /* vectors of 32 values */

/* Memory of one piece, in words. */
struct few_layout {
    int64_t n_rows, k_blocks, v_blocks, k_words, v_padded, chunk;
    int64_t queries, bytes, k_scales, v_scales, scores, weights, out, sum, greatest, row, seen, reach, total;
    int64_t near_queries, near_keys, near_scores; /* with a window: floats */
};

INLINE bool has_values(int type) {
    return has_integers(type) || type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16;
}

/* Whether a piece is computed here. */
INLINE bool is_few(const struct attention *a, const struct attention_piece *p) {
    return (p->stop_token - p->first_token) * a->group <= 2 * FEW_STRIP && has_values(a->k->type) &&
           has_values(a->v->type) && a->k_size % 32 == 0 && a->v_size % 32 == 0;
}

/* Whether the queries are rounded, so that bytes are multiplied by bytes. */
INLINE bool rounds_queries(const struct attention *a) {
#ifdef ISA_VNNI
    return !a->exact && has_integers(a->k->type);
#else
    (void)a;
    return false;
#endif
}

INLINE struct few_layout few_layout(const struct attention *a, const struct attention_piece *p) {
    struct few_layout l;
    int64_t at = 0;
    l.n_rows = (p->stop_head - p->first_head) * (p->stop_token - p->first_token) * a->group;
    l.k_blocks = a->k_size / 32;
    l.v_blocks = a->v_size / 32;
    l.k_words = round_up(a->k_size, 64) / 4;
    l.v_padded = a->v_padded;
    l.chunk = FEW_CHUNK;
    while (l.chunk > 32 && l.chunk * (int64_t)(a->k->nb[1] + a->v->nb[1]) > FEW_BYTES)
        l.chunk /= 2;
#define PLACE(field, n) (l.field = at, at += round_up(n, 16))
    PLACE(queries, l.n_rows * (rounds_queries(a) ? 2 * l.k_words + l.k_blocks + 1 : a->k_size));
    PLACE(bytes, rounds_queries(a) ? FEW_CHUNK * l.k_words : 0);
    PLACE(k_scales, l.k_blocks * FEW_CHUNK);
    PLACE(v_scales, l.v_blocks * FEW_CHUNK);
    PLACE(scores, FEW_STRIP * FEW_CHUNK);
    PLACE(weights, FEW_STRIP * l.v_blocks * FEW_CHUNK);
    PLACE(out, l.n_rows * l.v_padded);
    PLACE(sum, l.n_rows);
    PLACE(greatest, l.n_rows);
    PLACE(row, FEW_STRIP * 16 * 16 > a->k_size ? FEW_STRIP * 16 * 16 : a->k_size);
    PLACE(seen, p->stop_token - p->first_token);
    PLACE(reach, p->stop_token - p->first_token);
    PLACE(near_queries, a->window ? (l.n_rows + 1) * a->k_size : 0);
    PLACE(near_keys, a->window ? FEW_CHUNK * a->k_size : 0);
    PLACE(near_scores, a->window ? FEW_STRIP * FEW_CHUNK : 0);
#undef PLACE
    l.total = at;
    return l;
}

/* 32 values, without their block's scale. */
INLINE void load32(int type, const char *at, vf *values) {
    if (has_integers(type)) {
        struct values32 both = integers(type, (const uint8_t *)at);
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++)
            values[i] = v_lanes(i < PARTS / 2 ? both.first : both.last, i * VL % 16);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++)
            values[i] = type == TYPE_F32   ? v_load((const float *)at + i * VL)
                        : type == TYPE_F16 ? v_halves((const uint16_t *)at + i * VL)
                                           : v_bfloats((const uint16_t *)at + i * VL);
    }
}

/* Bytes of 32 values. */
INLINE int64_t bytes32(int type, const struct block_type *types) {
    return type == TYPE_F32 ? 128 : type == TYPE_F16 || type == TYPE_BF16 ? 64 : types[type].block_bytes;
}

/* Scales of up to 16 cells' blocks, each cell's `step` bytes after the other's, as floats. */
INLINE void few_scales(const char *cells, int64_t step, int64_t block_bytes, int64_t blocks, int64_t n, float *scales) {
    for (int64_t block = 0; block < blocks; block++, cells += block_bytes)
        for (int64_t from = 0; from < 16; from += VL) {
            b16 halves[2] = {{0}, {0}};
#if defined(ISA_AVX512) || defined(ISA_AVX2) /* without a way through memory */
#define HALF(i) (from + (i) < n ? *(const uint16_t *)(cells + (from + (i)) * step) : 0)
            __m128i h = _mm_setzero_si128();
#define PUT(i, at) h = _mm_insert_epi16(h, HALF(at), i);
            PUT(0, 0) PUT(1, 1) PUT(2, 2) PUT(3, 3) PUT(4, 4) PUT(5, 5) PUT(6, 6) PUT(7, 7)
            halves[0] = (b16)h;
#ifdef ISA_AVX512
            PUT(0, 8) PUT(1, 9) PUT(2, 10) PUT(3, 11) PUT(4, 12) PUT(5, 13) PUT(6, 14) PUT(7, 15)
            halves[1] = (b16)h;
#endif
#undef PUT
#undef HALF
#else
            for (int64_t i = 0; i < VL && from + i < n; i++)
                memcpy((char *)halves + 2 * i, cells + (from + i) * step, 2);
#endif
            v_store(scales + block * FEW_CHUNK + from, v_halves((const uint16_t *)halves));
        }
}

/* The scores of VL cells for the rows of a strip, in floats: `products` is room for VL vectors of each row. */
INLINE void few_dots_rows(int rows, int type, const char *cells, int64_t step, int64_t ahead, int64_t block_bytes,
                          int64_t blocks, int64_t n, const float *scales, const float *queries, float *products,
                          float *scores) {
    for (int64_t i = 0; i < VL; i++) {
        vf sums[FEW_STRIP];
        const char *cell = cells + (i < n ? i : 0) * step; /* what is past the last cell is not used */
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
            sums[r] = v_set(0.0f);
        for (int64_t block = 0; block < blocks; block++) {
            vf values[PARTS], scale = v_set(has_integers(type) ? scales[block * FEW_CHUNK + i] : 1.0f);
            __builtin_prefetch(cell + block * block_bytes + ahead, 0, 2);
            load32(type, cell + block * block_bytes, values);
#pragma GCC unroll 8
            for (int v = 0; v < PARTS; v++) {
                if (has_integers(type))
                    values[v] = v_mul(values[v], scale);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++)
                    sums[r] = v_fma(values[v], v_load(queries + (r * blocks + block) * 32 + v * VL), sums[r]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
            v_store(products + (r * VL + i) * VL, sums[r]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        v_store(scores + r * FEW_CHUNK, v_sums(products + r * VL * VL));
}

/* Add the weighted values of a chunk's cells to `out`: `blocks` times 32 values of each row of a strip. */
INLINE void few_values_rows(int rows, int blocks, int type, const char *cells, int64_t step, int64_t ahead,
                            int64_t block_bytes, int64_t n, const float *weights, int64_t row_weights,
                            int64_t block_weights, float *out, int64_t out_step, const float *factor) {
    vf sums[FEW_STRIP][SLICE * PARTS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < blocks * PARTS; c++)
            sums[r][c] = v_mul(v_load(out + r * out_step + c * VL), v_set(factor[r]));
    for (int64_t i = 0; i < n; i++) {
        vf values[SLICE * PARTS];
#pragma GCC unroll 2
        for (int b = 0; b < blocks; b++) {
            __builtin_prefetch(cells + i * step + b * block_bytes + ahead, 0, 2);
            load32(type, cells + i * step + b * block_bytes, values + b * PARTS);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int c = 0; c < blocks * PARTS; c++)
                sums[r][c] = v_fma(values[c], v_set(weights[r * row_weights + c / PARTS * block_weights + i]), sums[r][c]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < blocks * PARTS; c++)
            v_store(out + r * out_step + c * VL, sums[r][c]);
}

/* The two functions above with constants for what decides which registers are used, one for each type. */
#define DOTS(r) case r: few_dots_rows(r, type, cells, step, ahead, block_bytes, blocks, n, scales, queries, products, scores); break;
#define VALUES(r, b) \
    case r * 2 + b - 1: \
        few_values_rows(r, b, type, cells, step, ahead, block_bytes, n, weights, row_weights, block_weights, out, out_step, factor); \
        break;
#if defined(ISA_AVX512)
#define DOTS_OF_ROWS DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6)
#define VALUES_OF_ROWS \
    VALUES(1, 1) \
    VALUES(1, 2) VALUES(2, 2) VALUES(3, 2) VALUES(4, 2) VALUES(5, 2) VALUES(6, 2)
#else
#define DOTS_OF_ROWS DOTS(1) DOTS(2) DOTS(3)
#define VALUES_OF_ROWS VALUES(1, 1) VALUES(2, 1) VALUES(3, 1)
#endif
#define FEW_FUNCTIONS(name, type_number) \
    static void few_dots_##name(int rows, const char *cells, int64_t step, int64_t ahead, int64_t block_bytes, \
                                int64_t blocks, int64_t n, const float *scales, const float *queries, float *products, \
                                float *scores) { \
        enum { type = type_number }; \
        switch (rows) { DOTS_OF_ROWS } \
    } \
    static void few_values_##name(int rows, int value_blocks, const char *cells, int64_t step, int64_t ahead, \
                                  int64_t block_bytes, int64_t n, const float *weights, int64_t row_weights, \
                                  int64_t block_weights, float *out, int64_t out_step, const float *factor) { \
        enum { type = type_number }; \
        switch (rows * 2 + value_blocks - 1) { VALUES_OF_ROWS } \
    }
FEW_FUNCTIONS(f32, TYPE_F32)
FEW_FUNCTIONS(f16, TYPE_F16)
FEW_FUNCTIONS(bf16, TYPE_BF16)
FEW_FUNCTIONS(q8_0, TYPE_Q8_0)
FEW_FUNCTIONS(q5_0, TYPE_Q5_0)
FEW_FUNCTIONS(q4_0, TYPE_Q4_0)
FEW_FUNCTIONS(iq4_nl, TYPE_IQ4_NL)

#define FOR_TYPE(type, function, ...) \
    switch (type) { \
    case TYPE_F32: function##_f32(__VA_ARGS__); break; \
    case TYPE_F16: function##_f16(__VA_ARGS__); break; \
    case TYPE_BF16: function##_bf16(__VA_ARGS__); break; \
    case TYPE_Q8_0: function##_q8_0(__VA_ARGS__); break; \
    case TYPE_Q5_0: function##_q5_0(__VA_ARGS__); break; \
    case TYPE_Q4_0: function##_q4_0(__VA_ARGS__); break; \
    default: function##_iq4_nl(__VA_ARGS__); \
    }

#ifdef ISA_VNNI
#include "attend_bytes.h"
#endif

INLINE void few_queries(const struct attention *a, const struct attention_piece *p, const struct few_layout *l,
                        uint32_t *memory) {
    float scale = query_scale(a), *floats = (float *)memory;
    float *row = floats + l->near_queries + l->n_rows * a->k_size; /* where they are rounded, and there is a window */
    int64_t at = 0;
    for (int64_t head = p->first_head; head < p->stop_head; head++)
        for (int64_t token = p->first_token; token < p->stop_token; token++)
            for (int64_t g = 0; g < a->group; g++, at++) {
                const float *q = query_row(a, p->stream, token, head * a->group + g);
                float *to = !rounds_queries(a) ? floats + l->queries + at * a->k_size : a->window ? row : floats + l->row;
                if (a->window)
                    two_queries(a, p->stream, token, q, scale, floats + l->near_queries + at * a->k_size, to);
                for (int64_t i = 0; !a->window && i < a->k_size; i++)
                    to[i] = q[i] * scale;
#ifdef ISA_VNNI
                if (rounds_queries(a))
                    round_query(l, memory, at, to, a->k_size);
#endif
            }
}

/* The scores of a chunk's `n` cells for rows [at, at + rows). */
INLINE void few_scores(const struct attention *a, const struct few_layout *l, uint32_t *memory, int64_t at, int rows,
                       const char *k, int64_t n, int64_t ahead) {
    float *floats = (float *)memory, *scores = floats + l->scores;
    int64_t step = (int64_t)a->k->nb[1], block_bytes = bytes32(a->k->type, a->types);
#ifdef ISA_VNNI
    if (rounds_queries(a)) {
        score_bytes(l, memory, at, rows, n, scores);
        return;
    }
#endif
    for (int64_t i = 0; i < n; i += VL)
        FOR_TYPE(a->k->type, few_dots, rows, k + i * step, step, ahead, block_bytes, l->k_blocks, n - i,
                 floats + l->k_scales + i, floats + l->queries + at * a->k_size, floats + l->row, scores + i)
}

/* Likewise as near keys. */
INLINE void few_near_scores(const struct attention *a, const struct few_layout *l, float *floats, int64_t at, int rows,
                            int64_t n) {
    for (int64_t i = 0; i < n; i += VL)
        few_dots_f32(rows, (const char *)(floats + l->near_keys + i * a->k_size), a->k_size * 4, 0, 128, l->k_blocks, n - i,
                     floats + l->k_scales, floats + l->near_queries + at * a->k_size, floats + l->row,
                     floats + l->near_scores + i);
}

/* Score, weigh and sum rows [at, at + rows) of a head over a chunk's cells. */
INLINE void few_strip(const struct attention *a, const struct attention_piece *p, const struct few_layout *l,
                      uint32_t *memory, int64_t at, int rows, int64_t first_row, int64_t head, int64_t first_cell,
                      const char *k, const char *v, int64_t n, bool next, int32_t sides) {
    float *floats = (float *)memory, *scores = floats + l->scores, factor[FEW_STRIP];
    bool scaled_values = has_integers(a->v->type);
    if (sides & FAR)
        few_scores(a, l, memory, at, rows, k, n, next ? l->chunk * (int64_t)a->k->nb[1] : 0);
    if (sides & NEAR)
        few_near_scores(a, l, floats, at, rows, n);
    for (int r = 0; r < rows; r++) {
        int64_t row = at + r - first_row, token = row / a->group;
        float *row_scores = scores + r * FEW_CHUNK, *weights = floats + l->weights + r * l->v_blocks * FEW_CHUNK;
        const uint16_t *mask = ((int32_t *)memory)[l->seen + token] == SEEN
                                   ? NULL
                                   : mask_row(a, p->stream, p->first_token + token) + first_cell;
        int32_t reach = ((int32_t *)memory)[l->reach + token];
        const float *near = floats + l->near_scores + r * FEW_CHUNK;
        if (!(reach & FAR) && sides & NEAR)
            memcpy(row_scores, near, (size_t)n * 4);
        if (reach == (FAR | NEAR))
            choose(a, row_position(a, p->stream, p->first_token + token), positions_of(a, p->stream, first_cell), near,
                   row_scores, n);
        factor[r] = weigh(row_scores, n, mask, alibi_slope(a, head * a->group + row % a->group), a->softcap,
                          floats + l->greatest + at + r, floats + l->sum + at + r, (uint32_t *)row_scores, 0);
        for (int64_t block = 0; scaled_values && block < l->v_blocks; block++)
            for (int64_t i = 0; i < n; i += VL)
                v_store(weights + block * FEW_CHUNK + i,
                        v_mul(v_load(row_scores + i), v_load(floats + l->v_scales + block * FEW_CHUNK + i)));
    }
    int64_t block_bytes = bytes32(a->v->type, a->types), step = (int64_t)a->v->nb[1];
    for (int64_t block = 0; block < l->v_blocks; block += SLICE) {
        int blocks = l->v_blocks - block < SLICE ? (int)(l->v_blocks - block) : SLICE;
        int together = blocks == SLICE ? rows : 1; /* what is left of sizes like 96 is not worth functions of its own */
        const float *weights = scaled_values ? floats + l->weights + block * FEW_CHUNK : scores;
        int64_t row_weights = scaled_values ? l->v_blocks * FEW_CHUNK : FEW_CHUNK;
        for (int r = 0; r < rows; r += together)
            FOR_TYPE(a->v->type, few_values, together, blocks, v + block * block_bytes, step,
                     next ? l->chunk * step : 0, block_bytes, n, weights + r * row_weights, row_weights,
                     scaled_values ? FEW_CHUNK : 0, floats + l->out + (at + r) * l->v_padded + block * 32, l->v_padded,
                     factor + r)
    }
}

/* Read a chunk's scales of one head, and K's bytes where these are multiplied as they are. */
INLINE void few_prepare(const struct attention *a, const struct few_layout *l, uint32_t *memory, const char *k,
                        const char *v, const int32_t *positions, int64_t n, bool next, int32_t sides) {
    int64_t k_step = (int64_t)a->k->nb[1], v_step = (int64_t)a->v->nb[1];
    for (int64_t i = 0; i < n; i += 16) {
        int64_t some = n - i < 16 ? n - i : 16;
        if (has_integers(a->k->type) && sides & FAR)
            few_scales(k + i * k_step, k_step, bytes32(a->k->type, a->types), l->k_blocks, some, (float *)memory + l->k_scales + i);
        if (has_integers(a->v->type))
            few_scales(v + i * v_step, v_step, bytes32(a->v->type, a->types), l->v_blocks, some, (float *)memory + l->v_scales + i);
#ifdef ISA_VNNI
        if (rounds_queries(a) && sides & FAR)
            pack_key_bytes(a, l, memory, k + i * k_step, i, some, next ? l->chunk * k_step : 0);
#endif
    }
    for (int64_t i = 0; i < n && sides & NEAR; i++)
        near_key(a, k + i * k_step, positions[i], (float *)memory + l->near_keys + i * a->k_size);
    (void)next;
}

INLINE void attend_few(const struct attention *a, const struct attention_piece *p, float *scratch) {
    struct few_layout l = few_layout(a, p);
    uint32_t *memory = (uint32_t *)scratch;
    int64_t head_rows = (p->stop_token - p->first_token) * a->group;
    int64_t strips = (head_rows + FEW_STRIP - 1) / FEW_STRIP, strip = (head_rows + strips - 1) / strips;
    memset(scratch + l.out, 0, (size_t)(l.greatest - l.out) * 4);
    for (int64_t i = 0; i < l.n_rows; i++)
        scratch[l.greatest + i] = -INFINITY;
    few_queries(a, p, &l, memory);
    for (int64_t cell = p->first_cell; cell < p->stop_cell; cell += l.chunk) {
        int64_t n = p->stop_cell - cell < l.chunk ? p->stop_cell - cell : l.chunk;
        bool next = cell + 2 * l.chunk <= a->n_cells; /* a whole chunk follows: it can be prefetched */
        if (!look(a, p, (int32_t *)memory + l.seen, cell, n))
            continue;
        int32_t sides = measure(a, p, (int32_t *)memory + l.seen, (int32_t *)memory + l.reach, cell, n);
        const int32_t *positions = sides & NEAR ? positions_of(a, p->stream, cell) : NULL;
        for (int64_t head = p->first_head; head < p->stop_head; head++) {
            const char *k = cell_of(a->k, p->stream, head, cell), *v = cell_of(a->v, p->stream, head, cell);
            int64_t first_row = (head - p->first_head) * head_rows;
            few_prepare(a, &l, memory, k, v, positions, n, next, sides);
            for (int64_t at = 0; at < head_rows; at += strip) {
                int rows = (int)(head_rows - at < strip ? head_rows - at : strip);
                few_strip(a, p, &l, memory, first_row + at, rows, first_row, head, cell, k, v, n, next, sides);
            }
        }
    }
    finish_rows(a, p, scratch + l.out, scratch + l.sum, scratch + l.greatest);
}
