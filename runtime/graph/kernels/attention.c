/* An attention node, shared out between ggml's threads.
 *
 * Many rows: a piece is one KV head and some tokens, over all cells. Few rows, as when a text is written: a piece is all
 * heads and some cells, and the one who finishes the last of them joins the parts, in order. What is computed for a
 * row depends neither on the number of threads nor on who computes it.
 */
#include "kernels.h"

enum { FEW_ROWS = 64 };              /* query rows of a KV head up to which the cells are shared out */
enum { PIECE_FLOATS = 24576 };       /* floats of a piece's result: it stays in a core's cache, and the cells are unpacked */
                                     /* seldom enough that this costs little */

struct plan {
    struct attention attention;
    int64_t tokens, parts, cells; /* tokens of a piece; parts into which the cells are divided, and cells of each */
    int64_t n_pieces;
    bool few;
};

static struct attention read_node(const struct context *context, const struct tensor *node) {
    const struct attention_params *params = &custom_params((struct tensor *)node)->attention;
    const struct tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
    return (struct attention){
        .types = context->types,
        .q = q,
        .k = k,
        .v = v,
        .mask = node->src[3],
        .sinks = node->src[4] ? (const float *)node->src[4]->data : NULL,
        .out = node->data,
        .n_tokens = q->ne[1],
        .n_heads = q->ne[2],
        .n_kv_heads = k->ne[2],
        .group = q->ne[2] / k->ne[2],
        .n_cells = k->ne[1],
        .k_size = k->ne[0],
        .v_size = v->ne[0],
        .v_padded = (v->ne[0] + 31) / 32 * 32,
        .scale = params->scale,
        .max_bias = params->max_bias,
        .softcap = params->logit_softcap,
        /* bfloat16 would lose what these types hold */
        .exact = context->exact || k->type == TYPE_F32 || k->type == TYPE_F16 || v->type == TYPE_F32 || v->type == TYPE_F16,
    };
}

static struct plan make_plan(const struct context *context, const struct tensor *node, int n_threads) {
    struct plan plan = {.attention = read_node(context, node), .parts = 1};
    const struct attention *a = &plan.attention;
    int64_t streams = a->q->ne[3], rows = a->n_heads * a->n_tokens;
    plan.few = a->n_tokens * a->group <= FEW_ROWS;
    if (plan.few) { /* independent of the number of threads, as the order of sums is */
        plan.cells = a->n_cells <= 4096 ? 256 : 512;
        int64_t most = PARTIAL_FLOATS / (rows * partial_floats(a) * streams);
        while (plan.cells < a->n_cells && (a->n_cells + plan.cells - 1) / plan.cells > most)
            plan.cells *= 2;
        plan.parts = (a->n_cells + plan.cells - 1) / plan.cells;
        plan.tokens = a->n_tokens;
        plan.n_pieces = streams * plan.parts;
    } else {
        plan.cells = a->n_cells;
        plan.tokens = PIECE_FLOATS / (a->v_padded * a->group) > 0 ? PIECE_FLOATS / (a->v_padded * a->group) : 1;
        while (plan.tokens * a->group > 48 &&
               streams * a->n_kv_heads * ((a->n_tokens + plan.tokens - 1) / plan.tokens) < 3 * n_threads)
            plan.tokens = (plan.tokens + 1) / 2;
        plan.n_pieces = streams * a->n_kv_heads * ((a->n_tokens + plan.tokens - 1) / plan.tokens);
    }
    return plan;
}

static struct attention_piece piece_at(const struct plan *plan, int64_t index, float *partials) {
    const struct attention *a = &plan->attention;
    struct attention_piece p = {.stop_head = a->n_kv_heads, .stop_token = a->n_tokens, .stop_cell = a->n_cells};
    if (plan->few) {
        p.stream = index / plan->parts;
        p.first_cell = index % plan->parts * plan->cells;
        if (p.first_cell + plan->cells < a->n_cells)
            p.stop_cell = p.first_cell + plan->cells;
        if (plan->parts > 1)
            p.partial = partials + index * a->n_heads * a->n_tokens * partial_floats(a);
    } else { /* the pieces of one head follow each other, so that threads share its cells in the common cache */
        int64_t blocks = (a->n_tokens + plan->tokens - 1) / plan->tokens;
        p.stream = index / (a->n_kv_heads * blocks);
        p.first_head = index / blocks % a->n_kv_heads;
        p.stop_head = p.first_head + 1;
        p.first_token = index % blocks * plan->tokens;
        if (p.first_token + plan->tokens < a->n_tokens)
            p.stop_token = p.first_token + plan->tokens;
    }
    return p;
}

/* Join the partial results of a stream's row, whose parts are `step` floats apart; the first part's values are summed
 * up in place. */
static void join_row(const struct plan *plan, float *first, int64_t step, int64_t stream, int64_t token, int64_t head) {
    const struct attention *a = &plan->attention;
    float greatest = -INFINITY, sum = 0.0f;
    int64_t size = a->v_padded;
    for (int64_t part = 0; part < plan->parts; part++) {
        float theirs = first[part * step + size + 1];
        greatest = theirs > greatest ? theirs : greatest;
    }
    for (int64_t part = 0; part < plan->parts; part++) {
        float *values = first + part * step, factor = values[size + 1] == -INFINITY ? 0.0f : exp2f(values[size + 1] - greatest);
        sum += values[size] * factor;
        for (int64_t i = 0; i < size; i++)
            first[i] = (part ? first[i] : 0.0f) + values[i] * factor;
    }
    write_row(a, stream, token, head, first, sum, greatest);
}

static void join(const struct plan *plan, float *partials) {
    const struct attention *a = &plan->attention;
    int64_t step = a->n_heads * a->n_tokens * partial_floats(a), row = 0;
    for (int64_t stream = 0; stream < a->q->ne[3]; stream++) {
        row = 0;
        for (int64_t head = 0; head < a->n_kv_heads; head++)
            for (int64_t token = 0; token < a->n_tokens; token++)
                for (int64_t g = 0; g < a->group; g++, row++)
                    join_row(plan, partials + stream * plan->parts * step + row * partial_floats(a), step, stream, token,
                             head * a->group + g);
    }
}

/* Whether cells of a cache can be unpacked: numbers or whole blocks that follow each other within a head. */
static bool readable(const struct context *context, const struct tensor *cells) {
    int type = cells->type;
    if (type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16)
        return cells->nb[0] == (type == TYPE_F32 ? 4 : 2);
    if (type < 0 || type >= N_TYPES || context->types[type].dequantise == NULL)
        return false;
    return cells->nb[0] == (size_t)context->types[type].block_bytes && cells->ne[0] % context->types[type].block == 0;
}

static bool contiguous_floats(const struct tensor *x) {
    size_t step = 4;
    for (int i = 0; i < 4; step *= (size_t)x->ne[i++])
        if (x->nb[i] != step)
            return false;
    return x->type == TYPE_F32;
}

bool attention_covers(const struct context *context, const struct tensor *node) {
    const struct tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3], *sinks = node->src[4];
    if (q->type != TYPE_F32 || q->nb[0] != 4 || !readable(context, k) || !readable(context, v))
        return false;
    if (k->ne[0] != q->ne[0] || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3])
        return false;
    if (k->ne[2] == 0 || q->ne[2] % k->ne[2] != 0)
        return false;
    if (mask && (mask->type != TYPE_F16 || mask->nb[0] != 2 || mask->ne[2] != 1 || mask->ne[0] != k->ne[1] ||
                 mask->ne[1] < q->ne[1] || q->ne[3] % mask->ne[3] != 0))
        return false;
    if (sinks && (!contiguous_floats(sinks) || sinks->ne[0] != q->ne[2]))
        return false;
    return contiguous_floats(node) && node->ne[0] == v->ne[0] && node->ne[1] == q->ne[2] && node->ne[2] == q->ne[1];
}

EXPORT void ropewalk_attention(struct tensor *node, int thread, int n_threads, void *userdata) {
    struct context *context = userdata;
    struct plan plan = make_plan(context, node, n_threads);
    int64_t index;
    if (!find_window(context, node, &plan.attention))
        fail(context, node, "this attention cannot be computed with a near window");
    while (!atomic_load(&context->failed) && (index = atomic_fetch_add(&context->claims.next, 1)) < plan.n_pieces) {
        struct attention_piece piece = piece_at(&plan, index, context->partials);
        float *scratch = reserve(context, &context->scratch[thread],
                                 context->instructions->attention_scratch(&plan.attention, &piece), node);
        if (scratch == NULL)
            break;
        context->instructions->attend(&plan.attention, &piece, scratch);
        if (atomic_fetch_add(&context->claims.done, 1) + 1 == plan.n_pieces && plan.parts > 1)
            join(&plan, context->partials);
    }
    leave(context, n_threads);
}
