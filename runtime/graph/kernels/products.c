/* Products of stored weights with many rows, shared out between ggml's threads.
 *
 * First the rows are converted, each once for all threads; then a piece is some of the weight's rows, and, where there
 * would be too few pieces, some of the tokens. What is computed does not depend on how it is shared out.
 */
#include "kernels.h"

#include <sched.h>

enum { CONVERTED = 1 << 15 };   /* values that are converted at a time */
enum { PIECE_COLUMNS = 128 };   /* at most; a multiple of COLUMN_STEP */
enum { MIN_PIECE_ROWS = 96 };   /* tokens that a weight is unpacked for at least; a multiple of each strip */
enum { FEW_BYTES = 1 << 13 };   /* of a weight, in a piece of a product with a few rows */
enum { PIECES_PER_THREAD = 4 }; /* so that nobody waits for long at the end */

struct plan {
    struct product product;
    int64_t rows_converted, n_conversions;
    int64_t columns, column_pieces, rows, n_pieces;
};

static int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* What the weight's type holds is more than bfloat16 can. */
static bool is_fine(int type) { return type == TYPE_F32 || type == TYPE_F16; }

static struct product read_node(const struct context *context, const struct tensor *node) {
    const struct tensor *weight = node->src[0], *x = node->src[1];
    return (struct product){
        .types = context->types,
        .weight = weight,
        .x = x->data,
        .out = node->data,
        .x_step = x->nb[1],
        .out_step = node->nb[1],
        .n_in = weight->ne[0],
        .n_out = weight->ne[1],
        .n_rows = x->ne[1],
        .exact = context->exact || is_fine(weight->type),
    };
}

static struct plan make_plan(const struct context *context, struct product product, int n_threads) {
    struct plan plan = {.product = product, .columns = PIECE_COLUMNS};
    struct product *p = &plan.product;
    int64_t wanted = n_threads == 1 ? 1 : (int64_t)n_threads * PIECES_PER_THREAD;
    p->strip_rows = context->instructions->rows_of_strip(p);
    p->strip_words = context->instructions->words_of_strip(p);
    plan.rows_converted = ceil_div(CONVERTED, p->n_in * p->strip_rows) * p->strip_rows; /* whole strips */
    plan.n_conversions = ceil_div(p->n_rows, plan.rows_converted);
    while (plan.columns > COLUMN_STEP && ceil_div(p->n_out, plan.columns) < wanted)
        plan.columns -= COLUMN_STEP;
    plan.column_pieces = ceil_div(p->n_out, plan.columns);
    int64_t groups = ceil_div(wanted, plan.column_pieces);
    plan.rows = ceil_div(ceil_div(p->n_rows, groups), MIN_PIECE_ROWS) * MIN_PIECE_ROWS;
    plan.n_pieces = plan.column_pieces * ceil_div(p->n_rows, plan.rows);
    return plan;
}

/* The pieces of one part of the tokens follow each other, so that threads share it in the common cache. */
static struct product_piece piece_at(const struct plan *plan, int64_t index) {
    const struct product *p = &plan->product;
    struct product_piece piece = {
        .first_row = index / plan->column_pieces * plan->rows,
        .stop_row = p->n_rows,
        .first_column = index % plan->column_pieces * plan->columns,
        .stop_column = p->n_out,
    };
    if (piece.first_row + plan->rows < p->n_rows)
        piece.stop_row = piece.first_row + plan->rows;
    if (piece.first_column + plan->columns < p->n_out)
        piece.stop_column = piece.first_column + plan->columns;
    return piece;
}

/* Wait until `n` pieces of the first phase are finished; false if the node has failed. */
static bool wait_for(struct context *context, int64_t n) {
    for (int turn = 0; atomic_load_explicit(&context->claims.ready, memory_order_acquire) < n; turn++) {
        if (atomic_load(&context->failed))
            return false;
        if (turn < 64)
            pause_briefly();
        else
            sched_yield();
    }
    return true;
}

/* The first phase: whoever comes first reserves memory for the rows, and all convert them. */
static bool convert(struct context *context, struct plan *plan, const struct tensor *node, int64_t index) {
    struct product *p = &plan->product;
    if (index == 0) {
        if (reserve(context, &context->shared, ceil_div(p->n_rows, p->strip_rows) * p->strip_words, node) == NULL)
            return false;
    } else {
        if (!wait_for(context, 1))
            return false;
        int64_t first = (index - 1) * plan->rows_converted, stop = first + plan->rows_converted;
        p->words = (uint32_t *)context->shared.data;
        context->instructions->convert_rows(p, first, stop < p->n_rows ? stop : p->n_rows);
    }
    atomic_fetch_add(&context->claims.ready, 1);
    return true;
}

/* Claim the next piece: `step` of `n` rows of the weight, from the thread's own share as long as there are some, and then
 * from those of others. `share` is where it looked last, at first its own. */
static bool claim(struct context *context, int n_threads, int64_t n, int64_t step, int *share, int *looked, int64_t *first,
                  int64_t *stop) {
    int64_t pieces = ceil_div(n, step);
    for (; *looked < n_threads; ++*looked, *share = (*share + 1) % n_threads) {
        int64_t begin = pieces * *share / n_threads, end = pieces * (*share + 1) / n_threads;
        int64_t piece = begin + atomic_fetch_add(&context->shares[*share].next, 1);
        if (piece < end) {
            *first = piece * step;
            *stop = *first + step < n ? *first + step : n;
            return true;
        }
    }
    return false;
}

/* A few rows: a piece is some of the weight's rows. */
static void multiply_few(struct context *context, struct product *p, const struct tensor *node, int thread, int n_threads) {
    const struct instruction_set *set = context->instructions;
    int64_t step = ceil_div(ceil_div(FEW_BYTES, (int64_t)p->weight->nb[1]), 16) * 16, first, stop;
    int share = thread, looked = 0;
    p->words = (uint32_t *)reserve(context, &context->scratch[thread], set->few_words(p), node);
    if (p->words != NULL) {
        set->convert_few(p, p->words);
        while (!atomic_load(&context->failed) && claim(context, n_threads, p->n_out, step, &share, &looked, &first, &stop))
            set->multiply_few(p, first, stop);
    }
    leave(context, n_threads);
}

EXPORT void ropewalk_product(struct tensor *node, int thread, int n_threads, void *userdata) {
    struct context *context = userdata;
    struct product product = read_node(context, node);
    if (context->instructions->is_few_product && context->instructions->is_few_product(&product)) {
        multiply_few(context, &product, node, thread, n_threads);
        return;
    }
    struct plan plan = make_plan(context, product, n_threads);
    int64_t first_phase = 1 + plan.n_conversions;
    while (!atomic_load(&context->failed)) {
        int64_t index = atomic_fetch_add(&context->claims.next, 1);
        if (index < first_phase) {
            if (!convert(context, &plan, node, index))
                break;
            continue;
        }
        if (index - first_phase >= plan.n_pieces || !wait_for(context, first_phase))
            break;
        struct product_piece piece = piece_at(&plan, index - first_phase);
        float *scratch = reserve(context, &context->scratch[thread],
                                 context->instructions->product_scratch(&plan.product, &piece), node);
        if (scratch == NULL)
            break;
        plan.product.words = (uint32_t *)context->shared.data;
        context->instructions->multiply_weights(&plan.product, &piece, scratch);
    }
    leave(context, n_threads);
}

bool product_covers(const struct context *context, const struct tensor *node) {
    const struct tensor *weight = node->src[0], *x = node->src[1];
    if (node->ne[2] != 1 || node->ne[3] != 1 || node->nb[0] != 4)
        return false;
    /* A repacked weight has `extra` set; a weight that was computed is not a stored one. */
    if (weight->op != 0 || weight->view_src || weight->extra || weight->ne[2] != 1 || weight->ne[3] != 1)
        return false;
    const struct block_type *type = type_of(context, weight->type);
    if (type == NULL || weight->nb[1] != (size_t)(weight->ne[0] / type->block * type->block_bytes))
        return false;
    return x->type == TYPE_F32 && x->nb[0] == 4 && node->ne[1] >= context->instructions->min_rows(weight->type, context->exact);
}

/* For the Python side: whether a MUL_MAT node is a product that is computed here. */
EXPORT bool ropewalk_covers_product(const struct context *context, const struct tensor *node) {
    return product_covers(context, node);
}
