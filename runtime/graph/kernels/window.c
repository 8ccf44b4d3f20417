/* A band's near window: which nodes it applies to, at which positions their rows and cells are, and how far apart the two
 * rotations are there.
 *
 * A key is cached as the band's factors (of the far distances) rotate it, and a query comes so rotated. With θ_i the
 * model's own angle per token and φ_i the band's, a key at position p, and a query, are turned on by p (θ_i - φ_i) to be
 * as the model was trained to see them; and a query by W (θ_i - φ_i) to see a far key, as the window's distances count in
 * full. Start tokens keep the model's own rotation in the cache.
 *
 * Rows are at the positions that the graph's ROPE nodes read. Cells get theirs where a graph writes them: the same
 * positions, at the indices of its SET_ROWS nodes. Until then, a cell is at the position of its number.
 */
#include "kernels.h"
#include "turns.h"

#include <stdlib.h>

enum { FIRST_TURNS = 4096, MODE_NEIGHBOURS = 0, MODE_HALVES = 2 };

/* From the far rotation to the model's own. */
static void write_position(const struct window *w, int64_t position, float *turns) {
    float theta = (float)position, theta_scale = powf(w->freq_base, -2.0f / (float)w->n_dims);
    for (int64_t i = 0; i < w->n_dims / 2; i++, theta *= theta_scale)
        put_turn(turns, w->n_dims / 2, w->halves, i,
                 position < w->start_tokens ? 0.0 : angle_between(theta, w->far[i], w->own[i]), 1.0);
}

/* Have the turns of all positions below `n`; false without memory. */
static bool extend_turns(struct window *w, int64_t n) {
    if (n <= w->n_turns)
        return true;
    int64_t room = w->n_turns ? w->room : FIRST_TURNS;
    while (room < n)
        room *= 2;
    if (room > w->room) {
        float *turns = aligned_alloc(64, (size_t)(room * w->n_dims * 4 + 63) / 64 * 64);
        if (turns == NULL)
            return false;
        if (w->turns)
            memcpy(turns, w->turns, (size_t)(w->n_turns * w->n_dims) * 4);
        free(w->turns);
        w->turns = turns;
        w->room = room;
    }
    for (; w->n_turns < n; w->n_turns++)
        write_position(w, w->n_turns, w->turns + w->n_turns * w->n_dims);
    return true;
}

static void forget_window(struct window *w) {
    free(w->turns);
    free(w->border);
    free(w->still);
    free(w->own);
    *w = (struct window){0};
}

void free_windows(struct context *context) {
    forget_window(&context->window);
    for (int i = 0; i < N_PLACES; i++)
        free(context->places[i].of);
    free(context->rows.of);
}

int64_t window_floats(const struct context *context) {
    int64_t floats = context->window.room * context->window.n_dims + context->rows.room;
    for (int i = 0; i < N_PLACES; i++)
        floats += context->places[i].n;
    return floats;
}

/* Use a near window of `tokens` from now on, 0 for none: the model's own factors apply nearer than that, `far` ones beyond
 * it, n_dims / 2 each. False without memory. */
EXPORT bool ropewalk_set_window(struct context *context, int64_t tokens, int64_t start_tokens, int n_dims, bool halves,
                                float freq_base, const float *own, const float *far) {
    struct window *w = &context->window;
    size_t bytes = (size_t)n_dims / 2 * 4;
    if (w->tokens && tokens == w->tokens && start_tokens == w->start_tokens && n_dims == w->n_dims && halves == w->halves &&
        freq_base == w->freq_base && memcmp(own, w->own, bytes) == 0 && memcmp(far, w->far, bytes) == 0)
        return true;
    forget_window(w);
    if (!tokens)
        return true;
    *w = (struct window){.tokens = tokens, .start_tokens = start_tokens, .n_dims = n_dims, .freq_base = freq_base,
                         .halves = halves, .own = malloc(2 * bytes), .border = malloc(2 * bytes),
                         .still = malloc(2 * bytes)};
    if (w->own == NULL || w->border == NULL || w->still == NULL) {
        forget_window(w);
        return false;
    }
    w->far = w->own + n_dims / 2;
    memcpy(w->own, own, bytes);
    memcpy(w->far, far, bytes);
    for (int i = 0; i < n_dims / 2; i++) {
        double theta = (double)tokens * pow(freq_base, -2.0 * i / n_dims);
        put_turn(w->border, n_dims / 2, halves, i, theta / own[i] - theta / far[i], 1.0);
        put_turn(w->still, n_dims / 2, halves, i, 0.0, 1.0);
    }
    return true;
}

static int64_t n_values(const struct tensor *t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }

/* The positions of a cache's cells, of which there are `n`; NULL without memory, or for a third kind of cache. */
static struct places *places_of(struct context *context, int64_t n) {
    for (int i = 0; i < N_PLACES; i++) {
        struct places *places = &context->places[i];
        if (places->n == n)
            return places;
        if (places->n)
            continue;
        places->of = malloc((size_t)n * 4);
        if (places->of == NULL)
            return NULL;
        places->n = n;
        for (int64_t cell = 0; cell < n; cell++)
            places->of[cell] = (int32_t)cell;
        return places;
    }
    return NULL;
}

/* Have each cell at the position of its number, as after a sequence was restored. */
EXPORT void ropewalk_reset_places(struct context *context) {
    for (int i = 0; i < N_PLACES; i++)
        for (int64_t cell = 0; cell < context->places[i].n; cell++)
            context->places[i].of[cell] = (int32_t)cell;
}

/* Whether a node is a Hadamard transform, for all that can be told quickly: a product with a square matrix. */
static bool is_transform(const struct watch *watch, const struct tensor *node) {
    const struct tensor *matrix = node->src[0];
    return (node->op == watch->product || node->op == watch->custom) && matrix->type == TYPE_F32 && matrix->op == 0 &&
           matrix->ne[0] == matrix->ne[1] && n_values(matrix) == matrix->ne[0] * matrix->ne[0];
}

/* The tensor without an operation that a node's values come from. */
static const struct tensor *root_of(const struct watch *watch, const struct tensor *node) {
    while (node->op != 0 && (node->view_src || node->src[0]))
        node = node->view_src ? node->view_src : is_transform(watch, node) ? node->src[1] : node->src[0];
    return node;
}

static bool copy_positions(struct rows *rows, const struct tensor *positions) {
    int64_t n = positions->ne[0];
    if (n > rows->room) {
        free(rows->of);
        rows->of = malloc((size_t)n * 4);
        rows->room = rows->of ? n : 0;
    }
    rows->n = rows->of ? n : 0;
    if (rows->of)
        memcpy(rows->of, positions->data, (size_t)n * 4);
    return rows->of != NULL;
}

void see_rope(struct context *context, const struct tensor *node) {
    const struct tensor *positions = node->src[1];
    if (positions == NULL || positions->type != TYPE_I32 || positions->data == NULL)
        return;
    const struct tensor *root = root_of(&context->watch, node->src[0]);
    for (int i = 0; i < N_PLACES; i++) { /* llama.cpp shifts cached keys, the first layer's before those of all others */
        struct places *places = &context->places[i];
        if (root == places->cache && root != NULL && positions->ne[0] == places->n)
            for (int64_t cell = 0; cell < places->n; cell++)
                places->of[cell] += ((const int32_t *)positions->data)[cell];
        if (root == places->cache && root != NULL)
            return;
    }
    if (!copy_positions(&context->rows, positions)) {
        fail(context, node, "out of memory");
        return;
    }
    struct window *w = &context->window;
    int64_t last = -1;
    for (int64_t i = 0; w->tokens && i < context->rows.n; i++)
        last = context->rows.of[i] > last ? context->rows.of[i] : last;
    if (w->tokens && !extend_turns(w, last + 1))
        fail(context, node, "out of memory");
}

void see_write(struct context *context, const struct tensor *node) {
    const struct tensor *cache = node->view_src, *cells = node->src[1];
    if (cache == NULL || cells->type != TYPE_I64 || cells->data == NULL || cells->ne[0] != context->rows.n)
        return;
    struct places *places = places_of(context, n_values(cache) / cache->ne[0]);
    if (places == NULL)
        return;
    places->cache = places->cache ? places->cache : cache;
    for (int64_t i = 0; i < cells->ne[0]; i++) {
        int64_t cell = ((const int64_t *)cells->data)[i];
        if (cell >= 0 && cell < places->n)
            places->of[cell] = context->rows.of[i];
    }
}

/* Whether a node only gives its values another shape, or all of them a factor. */
static bool keeps_values(const struct watch *watch, const struct tensor *node) {
    float bias;
    memcpy(&bias, &node->op_params[1], 4);
    return node->op == watch->reshape || node->op == watch->view || node->op == watch->permute || node->op == watch->cont ||
           (node->op == watch->scale && bias == 0.0f);
}

/* The ROPE node that a node's values come from, through at most one Hadamard transform (a product with a square matrix) of
 * `*hadamard` values; NULL if anything else lies between. */
static const struct tensor *rope_behind(const struct watch *watch, const struct tensor *node, int64_t *hadamard) {
    *hadamard = 0;
    while (node && node->op != watch->rope) {
        const struct tensor *source = node->src[0];
        if (*hadamard == 0 && is_transform(watch, node)) {
            *hadamard = source->ne[0];
            source = node->src[1];
        } else if (!keeps_values(watch, node)) {
            return NULL;
        }
        if (source == NULL || n_values(source) != n_values(node))
            return NULL;
        node = source;
    }
    return node;
}

/* Where an attention node's queries and keys come from. */
struct origin {
    const struct tensor *rope, *cells; /* the latter a view of a cache */
    int64_t hadamard;
};

/* Find that, where it is such that a near window can be computed; false if it is not. */
static bool trace(const struct context *context, const struct tensor *node, struct origin *from) {
    struct rope_params params;
    const struct tensor *k = node->src[1];
    from->rope = rope_behind(&context->watch, node->src[0], &from->hadamard);
    from->cells = k->op == context->watch.copy ? k->src[0] : k; /* llama.cpp casts an f32 cache to f16 */
    if (from->rope == NULL || from->cells->view_src == NULL || from->rope->src[1]->type != TYPE_I32)
        return false;
    memcpy(&params, from->rope->op_params, sizeof params);
    int64_t size = from->hadamard, rows = node->src[0]->ne[1] * node->src[0]->ne[3];
    return (size == 0 || (size >= 16 && (size & (size - 1)) == 0 && k->ne[0] % size == 0)) &&
           (params.mode == MODE_NEIGHBOURS || params.mode == MODE_HALVES) && params.n_dims <= k->ne[0] &&
           from->rope->src[1]->ne[0] == rows && from->cells->nb[1] == from->cells->view_src->nb[1];
}

/* The ROPE node behind an attention node's queries, if the attention can be computed with a near window; otherwise NULL. */
EXPORT const struct tensor *ropewalk_windowed(const struct context *context, const struct tensor *node) {
    struct origin from;
    return attention_covers(context, node) && trace(context, node, &from) ? from.rope : NULL;
}

bool needs_window(const struct context *context, const struct tensor *node) {
    const struct watch *watch = &context->watch;
    const struct tensor *source = context->window.tokens ? node->src[0] : NULL;
    while (source && source->op != watch->rope) { /* whatever lies between */
        bool product = source->src[1] && source->src[0]->op == 0;
        source = product ? source->src[1] : source->src[0];
    }
    return source != NULL && source->src[2] == watch->setting->factors;
}

bool find_window(const struct context *context, const struct tensor *node, struct attention *a) {
    struct origin from;
    if (!needs_window(context, node))
        return true;
    if (!trace(context, node, &from))
        return false;
    const struct tensor *cells = from.cells, *cache = cells->view_src;
    for (int i = 0; i < N_PLACES; i++)
        if (context->places[i].n == n_values(cache) / cache->ne[0])
            a->cell_positions = context->places[i].of + (cells->data - cache->data) / (int64_t)cache->nb[1];
    a->row_positions = context->rows.of;
    a->stream_cells = (int64_t)(cells->nb[3] / cells->nb[1]);
    a->hadamard = from.hadamard;
    a->window = a->cell_positions && context->rows.n == from.rope->src[1]->ne[0] ? &context->window : NULL;
    return a->window != NULL;
}
