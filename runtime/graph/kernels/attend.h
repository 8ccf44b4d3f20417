/* Attention of some query rows over some cells, for one instruction set; see `struct attention_piece`.
 *
 * A chunk of cells is unpacked into panels once and then used by all rows, a strip at a time: scores, their running
 * maximum and sum (Milakov and Gimelshein, arXiv 1805.02867), weights, and the weighted sum of V. Scores are to the
 * base 2: the queries are multiplied by log2(e).
 *
 * With a near window there are two sides: the queries and keys of near distances, and those of far ones (near.h). Without
 * one, all distances are far.
 *
 * K's blocks of whole numbers stay whole (`whole`) where pairs of 16-bit numbers are multiplied by one instruction: the
 * queries are rounded to 15 bits, far more than bfloat16 has, and a block's sum is multiplied by its scale. A block's
 * minimum is multiplied by the sum of the queries there.
 */
#pragma once

#include "blocks.h"
#include "kernels.h"
#include "near.h"
#include "panels.h"

/* Whether K's whole numbers are multiplied as they are. */
INLINE bool keeps_whole(const struct attention *a) {
#ifdef ISA_VNNI
    return !a->exact && (has_integers(a->k->type) || has_minimum(a->k->type)) && a->k_size % 32 == 0;
#else
    (void)a;
    return false;
#endif
}

/* Queries and keys of near or far distances, and their scores. */
struct side {
    int64_t queries, query_scales, query_sums, k_panels, k_scales, k_minima, scores;
};

/* Memory of one piece, in words; a row of queries is a query head's vector for one token. */
struct attend_layout {
    int64_t n_rows, k_words, k_room, v_padded, chunk;
    bool whole;
    struct side far, near;
    int64_t v_panels, weights, out, sum, greatest, row, key, seen, reach, total;
};

INLINE int64_t place_side(struct side *side, const struct attention *a, const struct attend_layout *l, int64_t at) {
#define PLACE(field, n) (side->field = at, at += round_up(n, 16))
    PLACE(queries, l->n_rows * l->k_words + VL);
    PLACE(query_scales, l->whole ? l->n_rows : 0);
    PLACE(query_sums, l->whole ? l->n_rows * a->k_size / 32 : 0);
    PLACE(k_panels, l->chunk * l->k_room);
    PLACE(k_scales, l->whole ? l->chunk * a->k_size / 32 : 0);
    PLACE(k_minima, l->whole ? l->chunk * a->k_size / 32 : 0);
    PLACE(scores, MR * l->chunk);
#undef PLACE
    return at;
}

INLINE struct attend_layout attend_layout(const struct attention *a, const struct attention_piece *p, int bf) {
    struct attend_layout l = {0};
    int64_t at = 0, largest = a->k_size > a->v_size ? a->k_size : a->v_size;
    l.chunk = largest <= 128 ? 256 : 128;
    l.n_rows = (p->stop_head - p->first_head) * (p->stop_token - p->first_token) * a->group;
    l.whole = keeps_whole(a);
    l.k_words = words_of(a->k_size, bf || l.whole);
    l.k_room = round_up(l.k_words, VL);
    l.v_padded = a->v_padded;
#define PLACE(field, n) (l.field = at, at += round_up(n, 16))
    at = place_side(&l.far, a, &l, at);
    if (a->window)
        at = place_side(&l.near, a, &l, at);
    PLACE(v_panels, words_of(l.chunk, bf) * l.v_padded);
    PLACE(weights, MR * l.chunk);
    PLACE(out, l.n_rows * l.v_padded);
    PLACE(sum, l.n_rows);
    PLACE(greatest, l.n_rows);
    PLACE(row, VL * (round_up(largest, PANEL) + PANEL));
    PLACE(key, 2 * a->k_size);
    PLACE(seen, p->stop_token - p->first_token);
    PLACE(reach, p->stop_token - p->first_token);
#undef PLACE
    l.total = at;
    return l;
}

/* What the queries are multiplied by. */
INLINE float query_scale(const struct attention *a) {
    return a->softcap != 0.0f ? a->scale / a->softcap : a->scale * LOG2E;
}

INLINE const float *query_row(const struct attention *a, int64_t stream, int64_t token, int64_t head) {
    return (const float *)(a->q->data + stream * (int64_t)a->q->nb[3] + head * (int64_t)a->q->nb[2] +
                           token * (int64_t)a->q->nb[1]);
}

INLINE const char *cell_of(const struct tensor *cache, int64_t stream, int64_t head, int64_t cell) {
    return cache->data + stream * (int64_t)cache->nb[3] + head * (int64_t)cache->nb[2] + cell * (int64_t)cache->nb[1];
}

INLINE const uint16_t *mask_row(const struct attention *a, int64_t stream, int64_t token) {
    return (const uint16_t *)(a->mask->data + stream % a->mask->ne[3] * (int64_t)a->mask->nb[3] +
                              token * (int64_t)a->mask->nb[1]);
}

enum { HIDDEN = 0, SEEN = 1, MASKED = 2 };
enum { MINUS_INFINITY = 0xfc00 }; /* as half precision */

typedef uint64_t halves32 __attribute__((vector_size(64)));

/* How a token sees `n` cells: none of them, all, or as the mask says. */
INLINE int32_t visibility(const uint16_t *mask, int64_t n) {
    halves32 any = {0}, differs = {0};
    uint64_t any_last = 0, differs_last = 0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        halves32 some;
        memcpy(&some, mask + i, sizeof some);
        any |= some;
        differs |= some ^ (MINUS_INFINITY * 0x0001000100010001u);
    }
    for (; i < n; i++) {
        any_last |= mask[i];
        differs_last |= mask[i] ^ MINUS_INFINITY;
    }
    for (int lane = 0; lane < 8; lane++) {
        any_last |= any[lane];
        differs_last |= differs[lane];
    }
    return any_last == 0 ? SEEN : differs_last == 0 ? HIDDEN : MASKED;
}

/* ALiBi's slope of a head (Press et al., arXiv 2108.12409), as ggml computes it. */
INLINE float alibi_slope(const struct attention *a, int64_t head) {
    if (a->max_bias == 0.0f)
        return 1.0f;
    int64_t power = 1;
    while (power * 2 <= a->n_heads)
        power *= 2;
    return head < power ? powf(powf(2.0f, -a->max_bias / (float)power), (float)(head + 1))
                        : powf(powf(2.0f, -a->max_bias / 2.0f / (float)power), (float)(2 * (head - power) + 1));
}

/* cap * tanh(x / cap), with what `scores` have been divided by already. */
INLINE vf capped(vf x, float cap) {
    x = v_max(v_set(-15.0f), v_min(v_set(15.0f), x));
    vf below = v_exp2(v_mul(v_max(x, v_sub(v_set(0.0f), x)), v_set(-2.0f * LOG2E)), 1); /* e to the -2|x| */
    vf size = v_div(v_sub(v_set(1.0f), below), v_add(v_set(1.0f), below));
    vf sign = v_div(x, v_max(v_set(1e-30f), v_max(x, v_sub(v_set(0.0f), x))));
    return v_mul(v_mul(size, sign), v_set(cap * LOG2E));
}

/* Turn a row of `n` scores (room for a multiple of PANEL) into weights, as words; return what earlier sums are to be
 * multiplied by. */
INLINE float weigh(float *scores, int64_t n, const uint16_t *mask, float slope, float softcap, float *greatest,
                   float *sum, uint32_t *weights, int bf) {
    int64_t padded = round_up(n, PANEL);
    if (softcap != 0.0f)
        for (int64_t i = 0; i < n; i += VL)
            v_store(scores + i, capped(v_load(scores + i), softcap));
    for (int64_t i = n; i < padded; i++)
        scores[i] = -INFINITY;
    if (mask) {
        vf times = v_set(slope * LOG2E);
        int64_t i = 0;
        for (; i + VL <= n; i += VL)
            v_store(scores + i, v_fma(v_halves(mask + i), times, v_load(scores + i)));
        for (; i < n; i++)
            scores[i] += half_to_float(mask[i]) * slope * LOG2E;
    }
    vf most = v_load(scores);
    for (int64_t i = VL; i < padded; i += VL)
        most = v_max(most, v_load(scores + i));
    float before = *greatest, now = v_max_lane(most);
    now = before > now ? before : now; /* in this order, as it is to stay what is not a number */
    if (now == -INFINITY) { /* nothing has been seen yet */
        memset(scores, 0, (size_t)padded * 4);
        memset(weights, 0, (size_t)words_of(padded, bf) * 4);
        return 1.0f;
    }
    vf from = v_set(now), total = v_set(0.0f);
    for (int64_t i = 0; i < padded; i += VL) {
        vf weight = v_exp2(v_sub(v_load(scores + i), from), !bf);
        v_store(scores + i, weight);
        total = v_add(total, weight);
    }
    to_words(scores, padded, weights, bf);
    float factor = before == now ? 1.0f : exp2f(before - now);
    *greatest = now;
    *sum = *sum * factor + v_sum(total);
    return factor;
}

/* Ask for a cell's bytes; processors foresee no strides as long as those between the cells of one head. */
INLINE void prefetch(const char *cell, int64_t bytes) {
    for (int64_t i = 0; i < bytes + 63; i += 64) /* it may begin in the middle of a line */
        __builtin_prefetch(cell + (i < bytes ? i : bytes - 1), 0, 2);
}

enum { WHOLE_LIMIT = (1 << 14) - 1 }; /* of a rounded query: the sum of a block fits into 32 bits */
enum { NEAR_LIMIT = (1 << 13) - 1 };  /* likewise of a rounded query and a rounded key */

#ifdef ISA_VNNI
#include "attend_whole.h"
#endif

/* Unpack a chunk's cells of one head into panels of K, as near keys where they are given their `positions`; what is
 * missing in the last panel is 0. */
INLINE void pack_keys(const struct attention *a, const struct attend_layout *l, uint32_t *memory, const char *k,
                      const int32_t *positions, int64_t n, int64_t ahead, int bf) {
    float *row = (float *)memory + l->row;
    int64_t step = round_up(a->k_size, PANEL), k_step = (int64_t)a->k->nb[1];
    int64_t bytes = row_bytes(a->types, a->k->type, a->k_size);
    for (int64_t cell = 0; cell < round_up(n, PANEL); cell += VL) {
        for (int64_t i = 0; i < VL; i++) {
            float *to = row + i * step;
            if (ahead)
                prefetch(k + (cell + i + ahead) * k_step, bytes);
            if (cell + i < n && positions)
                near_key(a, k + (cell + i) * k_step, positions[cell + i], to);
            else if (cell + i < n)
                unpack(a->types, a->k->type, k + (cell + i) * k_step, to, a->k_size);
            else
                memset(to, 0, (size_t)a->k_size * 4);
            to_words(to, a->k_size, (uint32_t *)to, bf);
        }
        pack_columns((uint32_t *)row, step, l->k_words,
                     memory + (positions ? l->near : l->far).k_panels + cell / PANEL * l->k_room * PANEL,
                     (int)(cell % PANEL));
    }
}

/* Likewise of V. */
INLINE void pack_values(const struct attention *a, const struct attend_layout *l, uint32_t *memory, const char *v,
                        int64_t n, int64_t ahead, int bf) {
    float *one = (float *)memory + l->row, *two = one + l->v_padded;
    int64_t panel_words = words_of(l->chunk, bf) * PANEL, step = (int64_t)a->v->nb[1];
    int64_t bytes = row_bytes(a->types, a->v->type, a->v_size);
    memset(one, 0, (size_t)l->v_padded * 8);
    for (int64_t cell = 0; cell < n; cell += 1 + bf) {
        for (int64_t i = 0; ahead && i <= bf; i++)
            prefetch(v + (cell + i + ahead) * step, bytes);
        unpack(a->types, a->v->type, v + cell * step, one, a->v_size);
        if (bf && cell + 1 < n)
            unpack(a->types, a->v->type, v + (cell + 1) * step, two, a->v_size);
        else if (bf)
            memset(two, 0, (size_t)a->v_size * 4);
        pack_step(one, two, a->v_size, memory + l->v_panels + words_of(cell, bf) * PANEL, panel_words, bf);
    }
}

INLINE void pack_cells(const struct attention *a, const struct attend_layout *l, uint32_t *memory, int64_t stream,
                       int64_t head, int64_t first, int64_t n, int32_t sides, int bf) {
    const char *k = cell_of(a->k, stream, head, first), *v = cell_of(a->v, stream, head, first);
    int64_t ahead = first + 2 * l->chunk <= a->n_cells ? l->chunk : 0; /* the next chunk's, if it is as long */
    const int32_t *positions = sides & NEAR ? positions_of(a, stream, first) : NULL;
#ifdef ISA_VNNI
    if (l->whole && sides & NEAR)
        pack_whole_near(a, l, memory, k, positions, n);
    if (l->whole && sides & FAR)
        pack_whole_keys(a, l, memory, k, n, ahead);
#endif
    for (int32_t side = FAR; side <= NEAR && !l->whole; side++)
        if (sides & side)
            pack_keys(a, l, memory, k, side == NEAR ? positions : NULL, n, ahead, bf);
    pack_values(a, l, memory, v, n, ahead, bf);
}

/* The scores of a strip of rows [at, at + n) for the packed cells of one side. */
INLINE void score_side(const struct attention *a, const struct attend_layout *l, const struct side *side, uint32_t *memory,
                       int64_t at, int n, int64_t n_cells, int bf) {
    (void)a;
#ifdef ISA_VNNI
    if (l->whole)
        multiply_whole(a, l, side, memory, at, n, n_cells);
#endif
    for (int64_t c = 0; !l->whole && c < n_cells; c += PANEL)
        multiply(n, memory + side->queries + at * l->k_words, l->k_words, memory + side->k_panels + c * l->k_room,
                 l->k_words, (float *)memory + side->scores + c, l->chunk, NULL, bf);
}

/* Score, weigh and sum one strip of rows [at, at + n) of a head over the packed cells. */
INLINE void attend_strip(const struct attention *a, const struct attention_piece *p, const struct attend_layout *l,
                         uint32_t *memory, int64_t at, int n, int64_t first_row, int64_t head, int64_t first_cell,
                         int64_t n_cells, int32_t sides, int bf) {
    float *far = (float *)memory + l->far.scores, *near = (float *)memory + l->near.scores;
    float *out = (float *)memory + l->out + at * l->v_padded, factor[MR];
    uint32_t *weights = memory + l->weights;
    const int32_t *seen = (const int32_t *)memory + l->seen, *reach = (const int32_t *)memory + l->reach;
    int64_t weight_words = words_of(n_cells, bf);
    for (int32_t side = FAR; side <= NEAR; side++) /* one call, as all of it is inlined */
        if (sides & side)
            score_side(a, l, side == NEAR ? &l->near : &l->far, memory, at, n, n_cells, bf);
    for (int r = 0; r < n; r++) {
        int64_t row = at + r - first_row, token = row / a->group, query_head = head * a->group + row % a->group;
        const uint16_t *mask = seen[token] == SEEN ? NULL : mask_row(a, p->stream, p->first_token + token) + first_cell;
        float *scores = (reach[token] & FAR || !(sides & NEAR) ? far : near) + r * l->chunk;
        if (reach[token] == (FAR | NEAR))
            choose(a, row_position(a, p->stream, p->first_token + token), positions_of(a, p->stream, first_cell),
                   near + r * l->chunk, scores, n_cells);
        factor[r] = weigh(scores, n_cells, mask, alibi_slope(a, query_head), a->softcap,
                          (float *)memory + l->greatest + at + r, (float *)memory + l->sum + at + r,
                          weights + r * l->chunk, bf);
    }
    for (int64_t c = 0; c < l->v_padded; c += PANEL)
        multiply(n, weights, l->chunk, memory + l->v_panels + c * words_of(l->chunk, bf), weight_words, out + c,
                 l->v_padded, factor, bf);
}

/* Note how each token sees a chunk of cells; whether any sees one. */
INLINE bool look(const struct attention *a, const struct attention_piece *p, int32_t *seen, int64_t cell, int64_t n) {
    bool any = false;
    for (int64_t t = p->first_token; t < p->stop_token; t++) {
        int32_t how = a->mask ? visibility(mask_row(a, p->stream, t) + cell, n) : SEEN;
        seen[t - p->first_token] = how;
        any |= how != HIDDEN;
    }
    return any;
}

INLINE void write_query(const struct attention *a, const struct attend_layout *l, const struct side *side,
                        uint32_t *memory, int64_t at, const float *row, int32_t limit, int bf) {
    (void)limit;
#ifdef ISA_VNNI
    if (l->whole) {
        round_whole(l, side, memory, at, row, a->k_size, limit);
        return;
    }
#endif
    to_words(row, a->k_size, memory + side->queries + at * l->k_words, bf);
}

INLINE void prepare_queries(const struct attention *a, const struct attention_piece *p, const struct attend_layout *l,
                            uint32_t *memory, int bf) {
    float scale = query_scale(a), *far = (float *)memory + l->key, *near = far + a->k_size;
    int64_t at = 0;
    for (int64_t head = p->first_head; head < p->stop_head; head++)
        for (int64_t token = p->first_token; token < p->stop_token; token++)
            for (int64_t g = 0; g < a->group; g++, at++) {
                const float *q = query_row(a, p->stream, token, head * a->group + g);
                if (a->window) {
                    two_queries(a, p->stream, token, q, scale, near, far);
                    write_query(a, l, &l->near, memory, at, near, NEAR_LIMIT, bf);
                }
                for (int64_t i = 0; !a->window && i < a->k_size; i++)
                    far[i] = q[i] * scale;
                write_query(a, l, &l->far, memory, at, far, WHOLE_LIMIT, bf);
            }
}

/* Write the rows' results, or keep them to be joined with those of other cells. */
INLINE void finish_rows(const struct attention *a, const struct attention_piece *p, const float *out, const float *sum,
                        const float *greatest) {
    int64_t at = 0;
    for (int64_t head = p->first_head; head < p->stop_head; head++)
        for (int64_t token = p->first_token; token < p->stop_token; token++)
            for (int64_t g = 0; g < a->group; g++, at++) {
                const float *values = out + at * a->v_padded;
                if (p->partial) {
                    float *to = p->partial + at * partial_floats(a);
                    memcpy(to, values, (size_t)a->v_padded * 4);
                    to[a->v_padded] = sum[at];
                    to[a->v_padded + 1] = greatest[at];
                } else {
                    write_row(a, p->stream, token, head * a->group + g, values, sum[at], greatest[at]);
                }
            }
}

INLINE void attend_as(const struct attention *a, const struct attention_piece *p, float *scratch, int bf) {
    struct attend_layout l = attend_layout(a, p, bf);
    uint32_t *memory = (uint32_t *)scratch;
    int64_t head_rows = (p->stop_token - p->first_token) * a->group;
    memset(scratch + l.out, 0, (size_t)(l.greatest - l.out) * 4);
    for (int64_t i = 0; i < l.n_rows; i++)
        scratch[l.greatest + i] = -INFINITY;
    prepare_queries(a, p, &l, memory, bf);
    for (int64_t cell = p->first_cell; cell < p->stop_cell; cell += l.chunk) {
        int64_t n = p->stop_cell - cell < l.chunk ? p->stop_cell - cell : l.chunk;
        int32_t *seen = (int32_t *)memory + l.seen;
        int32_t *reach = (int32_t *)memory + l.reach;
        if (!look(a, p, seen, cell, n))
            continue;
        int32_t sides = measure(a, p, seen, reach, cell, n);
        for (int64_t head = p->first_head; head < p->stop_head; head++) {
            int64_t first_row = (head - p->first_head) * head_rows;
            pack_cells(a, &l, memory, p->stream, head, cell, n, sides, bf);
            for (int64_t at = 0; at < head_rows; at += MR) {
                int rows = (int)(head_rows - at < MR ? head_rows - at : MR);
                int32_t strip = 0;
                for (int64_t t = at / a->group; t <= (at + rows - 1) / a->group; t++)
                    strip |= seen[t] == HIDDEN ? 0 : reach[t];
                if (strip)
                    attend_strip(a, p, &l, memory, first_row + at, rows, first_row, head, cell, n, strip, bf);
            }
        }
    }
    finish_rows(a, p, scratch + l.out, scratch + l.sum, scratch + l.greatest);
}
