/* What the files of this folder share: one context's state, the pieces that threads claim, and the instruction sets.
 *
 * A node that was taken over calls its function on each of ggml's threads. Each thread claims pieces by counting up and
 * computes them, whatever the others do; the last one to leave prepares the counters for the next node, which no thread
 * enters before (ggml has a barrier between nodes).
 */
#pragma once

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "ggml_tensor.h"

#define LOG2E 1.44269504f
#define EXPORT __attribute__((visibility("default"))) /* for ctypes */

enum { MAX_THREADS = 512 };         /* GGML_MAX_N_THREADS */
enum { PARTIAL_FLOATS = 1 << 22 }; /* room for partial results: 16 MiB */

/* How the threads share the node under way. */
struct claims {
    atomic_llong next;  /* the next piece to claim */
    atomic_llong done;  /* pieces that are finished */
    atomic_llong ready; /* pieces of a first phase that are finished, for nodes that have one */
    atomic_int left;    /* threads that have left the node */
};

/* A thread's own part of a node's rows, in order: a core reads memory fastest where it goes straight on. */
struct share {
    _Alignas(64) atomic_llong next; /* pieces of it that have been claimed */
};

struct scratch {
    float *data;
    int64_t n_floats;
};

/* What the ROPE nodes of the model's global layers are set to: `RopeSetting` in library.py, which keeps it up to date. */
struct rope_setting {
    struct tensor *factors; /* the tensor of rescale factors in use; ours all have the same name */
    int64_t touched;        /* nodes set since this was last reset */
    float freq_base, native_scale, attention_factor;
    int32_t n_dims;
};

typedef bool (*see_function)(struct tensor *node, bool ask, void *userdata);

/* Which nodes `ropewalk_see` looks at, and ggml's codes of the operations; -1 for one whose nodes are left alone. */
struct watch {
    struct rope_setting *setting;
    int rope, attention, product, custom, write;
    int reshape, view, permute, cont, scale, copy; /* what may lie between a rotation and the attention */
    see_function closely;                          /* sees all nodes instead, unless NULL */
};

/* The near window of the band in use; see window.c. */
struct window {
    int64_t tokens; /* W; 0: the band has none */
    int64_t start_tokens;
    int32_t n_dims;
    float freq_base;
    bool halves;          /* a pair is a value of each half of the rotary ones, not two neighbours */
    float *own, *far;     /* the model's factors and the band's, in one piece of memory */
    float *turns;         /* of each position, n_dims cosines and sines: from the far rotation to the model's own */
    float *still;         /* likewise of no angle */
    float *border;        /* likewise from a query that sees far keys as if there were no window to one that has it */
    int64_t n_turns, room; /* positions whose turns there are, and for how many there is room */
};

/* The positions of a cache's cells. */
struct places {
    int64_t n;
    int32_t *of;
    const struct tensor *cache; /* the first layer's */
};

/* The positions of the tokens of the graph under way: a copy, as ggml reuses the memory of the tensor behind its last
 * rotation, before that layer's attention is computed. */
struct rows {
    int64_t n, room;
    int32_t *of;
};

enum { N_PLACES = 4 }; /* kinds of caches of one context, told apart by their length */

struct context {
    struct block_type types[N_TYPES];
    const struct instruction_set *instructions;
    bool exact; /* compute in floats, not in bfloat16 */
    struct watch watch;
    struct window window;
    struct places places[N_PLACES];
    struct rows rows;
    _Alignas(64) struct claims claims;
    struct share shares[MAX_THREADS];
    _Alignas(64) atomic_llong taken; /* nodes computed so far */
    atomic_int failed, stopped;
    char failure[160]; /* which node failed, and why */
    float *partials; /* of an attention node whose cells are shared out */
    struct scratch shared;
    struct scratch scratch[MAX_THREADS];
};

/* Part of an attention node: some heads' query rows over some of the cells. */
struct attention {
    const struct block_type *types;
    const struct tensor *q, *k, *v, *mask;
    const float *sinks;
    char *out;
    int64_t n_tokens, n_heads, n_kv_heads, group, n_cells, k_size, v_size, v_padded;
    float scale, max_bias, softcap;
    bool exact;
    const struct window *window; /* NULL: there is none, and what follows is not set */
    const int32_t *row_positions, *cell_positions; /* the latter of the first stream's first cell */
    int64_t stream_cells; /* from one stream's first cell to the next's */
    int64_t hadamard;     /* of how many values of queries and keys there is a Hadamard transform; 0: the values themselves */
};

struct attention_piece {
    int64_t stream, first_head, stop_head; /* heads of K and V */
    int64_t first_token, stop_token, first_cell, stop_cell;
    float *partial; /* where the result is to be joined with that of other cells; otherwise NULL */
};

/* A product of a stored weight: out[t][n] = sum over k of x[t][k] * weight[n][k]. */
struct product {
    const struct block_type *types;
    const struct tensor *weight;
    const char *x;   /* a row of floats for each token, `x_step` bytes apart */
    char *out;       /* likewise */
    size_t x_step, out_step;
    int64_t n_in, n_out, n_rows;
    bool exact;
    uint32_t *words; /* the rows of x as the products want them, made once for all threads */
    int64_t strip_rows, strip_words; /* which come in strips of as many rows, except for the last */
};

struct product_piece {
    int64_t first_row, stop_row;       /* of x */
    int64_t first_column, stop_column; /* rows of the weight; the first is a multiple of COLUMN_STEP */
};

enum { COLUMN_STEP = 32 }; /* a multiple of each instruction set's PANEL */

/* Copy the last columns of a piece, which are less than a panel of `width`, from where all rows have room for one. */
static inline void write_edge(const struct product *p, const struct product_piece *piece, const float *edge, int width) {
    int64_t over = (piece->stop_column - piece->first_column) % width;
    for (int64_t row = piece->first_row; over && row < piece->stop_row; row++, edge += width)
        memcpy((float *)(p->out + row * (int64_t)p->out_step) + piece->stop_column - over, edge, (size_t)over * 4);
}

/* The cached keys of one layer: `KeyCache` in library.py. */
struct key_cache {
    char *data; /* of the first cell */
    int64_t cell_bytes, n_heads, head_size;
    int32_t type, hadamard; /* of how many values a Hadamard transform is cached instead; 0: the values are */
};

/* Cells [start, stop), each at the position of its number, go from some factors to others (one per pair). */
struct rotation_run {
    int64_t start, stop;
    const float *before, *after;
};

/* Cells [next, stop) of some caches are rotated, and all of them scaled: `Rotating` in library.py. */
struct rotation {
    const struct key_cache *caches;
    const struct rotation_run *runs;
    int64_t n_caches, n_runs, stop;
    atomic_llong next; /* the first cell that no thread has claimed */
    int32_t n_dims;
    float freq_base, scale;
    bool halves; /* a pair is a value of each half of the rotary ones, not two neighbours */
};

/* How many values of a head are unpacked: those that share a block, or a transform, with rotary ones. */
static inline int64_t rotated_values(const struct block_type *types, const struct rotation *r, const struct key_cache *cache) {
    int64_t unit = types[cache->type].block;
    unit = cache->hadamard > unit ? cache->hadamard : unit;
    return (r->n_dims + unit - 1) / unit * unit;
}

/* The functions of one instruction set. */
struct instruction_set {
    const char *name;
    bool (*runs_here)(void);
    bool has_bfloat;
    /* Compute a piece with `scratch` of the size that `attention_scratch` gives. */
    int64_t (*attention_scratch)(const struct attention *a, const struct attention_piece *piece);
    void (*attend)(const struct attention *a, const struct attention_piece *piece, float *scratch);
    /* Likewise of a product, after rows of x have been converted to words. */
    int64_t (*rows_of_strip)(const struct product *p);
    int64_t (*words_of_strip)(const struct product *p);
    void (*convert_rows)(const struct product *p, int64_t first, int64_t stop);
    int64_t (*product_scratch)(const struct product *p, const struct product_piece *piece);
    void (*multiply_weights)(const struct product *p, const struct product_piece *piece, float *scratch);
    int64_t (*min_rows)(int type, bool exact); /* of x, from which this is faster than llama.cpp with such a weight */
    /* Whether a few rows can be multiplied straight from the weight's blocks; each thread converts them for itself, to
     * `few_words` words, and multiplies them by rows [first, stop) of the weight. NULL where this is not faster than
     * llama.cpp. */
    bool (*is_few_product)(const struct product *p);
    int64_t (*few_words)(const struct product *p);
    void (*convert_few)(const struct product *p, uint32_t *words);
    void (*multiply_few)(const struct product *p, int64_t first, int64_t stop);
    /* Rotate a cell's keys by a table of turns; `x` has room for a row. */
    void (*rotate_row)(const struct block_type *types, const struct rotation *r, const struct key_cache *cache,
                       const float *turns, char *row, float *x);
};

extern const struct instruction_set avx512_bf16_set, avx512_vnni_set, avx512_set, avx2_vnni_set, avx2_set, plain_set;

/* A partial result: for each row, the values that are not yet divided by the sum of the weights, the sum, and the
 * greatest score, to the base 2. */
static inline int64_t partial_floats(const struct attention *a) { return a->v_padded + 2; }

/* Write one row's result: `values` over `sum`, in which a sink counts as a score without a value. */
static inline void write_row(const struct attention *a, int64_t stream, int64_t token, int64_t head,
                             const float *values, float sum, float greatest) {
    float *out = (float *)a->out + ((stream * a->n_tokens + token) * a->n_heads + head) * a->v_size;
    float factor = 1.0f;
    if (a->sinks) {
        float sink = a->sinks[head] * LOG2E, most = greatest > sink ? greatest : sink;
        factor = exp2f(greatest - most);
        sum = sum * factor + exp2f(sink - most);
    }
    factor = sum == 0.0f ? 0.0f : factor / sum; /* ggml returns zeros where no cell is seen, too */
    for (int64_t i = 0; i < a->v_size; i++)
        out[i] = values[i] * factor;
}

/* The thread's scratch, or NULL with the failure kept. */
float *reserve(struct context *context, struct scratch *scratch, int64_t n_floats, const struct tensor *node);
void fail(struct context *context, const struct tensor *node, const char *why);

/* How a type is stored, or NULL if it cannot be read. */
static inline const struct block_type *type_of(const struct context *context, int type) {
    return type >= 0 && type < N_TYPES && context->types[type].block ? &context->types[type] : NULL;
}

/* Note what a graph's nodes tell of positions: a rotation, a write to a cache. */
void see_rope(struct context *context, const struct tensor *node);
void see_write(struct context *context, const struct tensor *node);
/* Whether the band's near window applies to an attention node's queries. */
bool needs_window(const struct context *context, const struct tensor *node);
/* Set the window of an attention node, where one applies; false if it cannot be computed. */
bool find_window(const struct context *context, const struct tensor *node, struct attention *a);
void free_windows(struct context *context);
int64_t window_floats(const struct context *context);

/* For a loop that waits for another thread. */
static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Leave a node: the last of the threads resets the claims. */
void leave(struct context *context, int n_threads);

/* Whether an attention node, a product can be computed here, and the functions that do. */
bool attention_covers(const struct context *context, const struct tensor *node);
bool product_covers(const struct context *context, const struct tensor *node);
void ropewalk_attention(struct tensor *node, int thread, int n_threads, void *userdata);
void ropewalk_product(struct tensor *node, int thread, int n_threads, void *userdata);
