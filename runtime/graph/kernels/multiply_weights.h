/* Products of weights with many rows, for one instruction set; see `struct product`.
 *
 * A tile is some columns of the result (rows of the weight) and a stretch of the shared dimension. It is unpacked into
 * panels once, which stay in a core's second cache, and then used by all rows, a strip at a time, which stays in the
 * first. A strip's sums are carried from one stretch to the next in the result itself.
 */
#pragma once

#include "blocks_k.h"
#include "kernels.h"
#include "multiply_bytes.h"
#include "panels.h"

enum { STRETCH_WORDS = 384 }; /* of the shared dimension, at most */
enum { UNPACKED = 256 };      /* values of a row that are unpacked at a time: whole blocks of every type */

INLINE int64_t stretch_values(const struct product *p, int bf) {
    int64_t most = STRETCH_WORDS * (1 + bf) / UNPACKED * UNPACKED, stretches = (p->n_in + most - 1) / most;
    return round_up((p->n_in + stretches - 1) / stretches, UNPACKED);
}

/* From one row of x to the next: a line more than it needs, so that a strip's rows do not compete for the same lines of
 * the cache. */
INLINE int64_t row_words(int64_t n_in, int bf) { return round_up(words_of(n_in, bf), 16) + 16; }

/* Memory of one piece, in words. */
struct product_layout {
    int64_t stretch, panel, panels, row, edge, total;
};

INLINE struct product_layout product_layout(const struct product *p, const struct product_piece *piece, int bf) {
    struct product_layout l = {.stretch = stretch_values(p, bf)};
    int64_t columns = round_up(piece->stop_column - piece->first_column, PANEL);
    l.panel = words_of(l.stretch, bf) * PANEL;
    l.row = columns / PANEL * l.panel;
    l.edge = l.row + VL * (UNPACKED + VL);
    l.total = l.edge + (piece->stop_row - piece->first_row) * PANEL;
    return l;
}

/* Unpack values [first, first + n) of some of the weight's rows into panels; missing rows of the last one are 0. */
INLINE void pack_weights(const struct product *p, const struct product_layout *l, uint32_t *memory, int64_t from,
                         int64_t to, int64_t first, int64_t n, int bf) {
    const struct tensor *w = p->weight;
    const struct block_type *kind = &p->types[w->type];
    enum { STEP = UNPACKED + VL }; /* so that rows do not compete for the same lines of the cache */
    float *rows = (float *)memory + l->row;
    for (int64_t column = from; column < round_up(to - from, PANEL) + from; column += VL)
        for (int64_t k = first; k < first + n; k += UNPACKED) {
            int64_t values = first + n - k < UNPACKED ? first + n - k : UNPACKED;
            for (int64_t i = 0; i < VL; i++) {
                float *row = rows + i * STEP;
                if (column + i < to)
                    unpack_weights(p->types, w->type, w->data + (column + i) * w->nb[1] + k / kind->block * kind->block_bytes,
                           row, values);
                else
                    memset(row, 0, (size_t)values * 4);
                to_words(row, values, (uint32_t *)row, bf);
            }
            pack_columns((uint32_t *)rows, STEP, words_of(values, bf),
                         memory + (column - from) / PANEL * l->panel + words_of(k - first, bf) * PANEL,
                         (int)((column - from) % PANEL));
        }
}

/* Multiply all rows by the packed tile. */
INLINE void multiply_tile(const struct product *p, const struct product_piece *piece, const struct product_layout *l,
                          uint32_t *memory, int64_t first, int64_t n, int bf) {
    int64_t step = row_words(p->n_in, bf);
    float ones[MR];
    for (int r = 0; r < MR; r++)
        ones[r] = 1.0f;
    for (int64_t row = piece->first_row; row < piece->stop_row; row += MR) {
        int rows = (int)(piece->stop_row - row < MR ? piece->stop_row - row : MR);
        const uint32_t *strip = p->words + row * step + words_of(first, bf);
        for (int64_t column = piece->first_column; column < piece->stop_column; column += PANEL) {
            bool whole = piece->stop_column - column >= PANEL;
            float *out = whole ? (float *)(p->out + row * p->out_step) + column
                               : (float *)memory + l->edge + (row - piece->first_row) * PANEL;
            multiply(rows, strip, step, memory + (column - piece->first_column) / PANEL * l->panel,
                     words_of(n, bf), out, whole ? (int64_t)p->out_step / 4 : PANEL, first ? ones : NULL, bf);
        }
    }
}

INLINE void multiply_weights_as(const struct product *p, const struct product_piece *piece, float *scratch, int bf) {
    struct product_layout l = product_layout(p, piece, bf);
    uint32_t *memory = (uint32_t *)scratch;
    for (int64_t k = 0; k < p->n_in; k += l.stretch) {
        int64_t n = p->n_in - k < l.stretch ? p->n_in - k : l.stretch;
        pack_weights(p, &l, memory, piece->first_column, piece->stop_column, k, n, bf);
        multiply_tile(p, piece, &l, memory, k, n, bf);
    }
    write_edge(p, piece, scratch + l.edge, PANEL);
}

#ifdef ISA_BF16
#define AS_BFLOAT(p) (!(p)->exact)
#else
#define AS_BFLOAT(p) 0
#endif
#define AS_BYTES(p) (HAS_BYTES && !(p)->exact && is_bytes((p)->weight->type) && words_at_a_time((p)->weight->type))

static void multiply_weights(const struct product *p, const struct product_piece *piece, float *scratch) {
#if HAS_BYTES
    if (AS_BYTES(p)) {
        multiply_weight_bytes(p, piece, scratch);
        return;
    }
#endif
    if (AS_BFLOAT(p))
        multiply_weights_as(p, piece, scratch, 1);
    else
        multiply_weights_as(p, piece, scratch, 0);
}

static int64_t product_scratch(const struct product *p, const struct product_piece *piece) {
#if HAS_BYTES
    if (AS_BYTES(p))
        return byte_layout(p, piece).total;
#endif
    return product_layout(p, piece, AS_BFLOAT(p)).total;
}

static int64_t rows_of_strip(const struct product *p) { return AS_BYTES(p) ? BYTE_MR : MR; }

static int64_t words_of_strip(const struct product *p) {
#if HAS_BYTES
    if (AS_BYTES(p))
        return p->n_in / 32 * strip_block(byte_kind(p->weight->type));
#endif
    return MR * row_words(p->n_in, AS_BFLOAT(p));
}

static void convert_rows(const struct product *p, int64_t first, int64_t stop) {
#if HAS_BYTES
    if (AS_BYTES(p)) {
        convert_rows_bytes(p, first, stop);
        return;
    }
#endif
    for (int64_t row = first; row < stop; row++)
        to_words((const float *)(p->x + row * p->x_step), p->n_in, p->words + row * row_words(p->n_in, AS_BFLOAT(p)), AS_BFLOAT(p));
}

/* Types whose values llama.cpp looks up in grids, IQ1_S to IQ3_S: it multiplies them by many rows faster than they can be
 * unpacked by its own function. */
INLINE bool is_grid(int type) { return (type >= 16 && type <= 19) || type == 21 || type == 22 || type == 29; }

/* Measured against llama.cpp's kernels for the same processor, where that could be done. */
static int64_t min_rows(int type, bool exact) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
#if defined(ISA_VNNI)
    if (is_bytes(type) && !exact)
        return 1;
#endif
    (void)exact;
    return is_grid(type) ? INT64_MAX : type == TYPE_F16 ? 64 : 32;
#else
    (void)type, (void)exact;
    return INT64_MAX;
#endif
}
