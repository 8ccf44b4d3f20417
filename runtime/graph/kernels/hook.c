/* The graph callback: llama.cpp shows each node before it is computed, some thousand for a token. What a node reads is
 * set here, or what it does; as in rope.py and fast.py, which serve where there is no library.
 */
#include "kernels.h"

#include <string.h>

/* Look at the nodes of these operations from now on: codes in the order of `struct watch`. `setting` outlives the
 * context's graphs. */
EXPORT void ropewalk_watch(struct context *context, const int *codes, struct rope_setting *setting) {
    see_function closely = context->watch.closely;
    context->watch = (struct watch){setting,  codes[0], codes[1], codes[2], codes[3], codes[4],
                                    codes[5], codes[6], codes[7], codes[8], codes[9], codes[10], closely};
}

/* Have `see` called for every node instead; NULL ends that. */
EXPORT void ropewalk_watch_closely(struct context *context, see_function see) { context->watch.closely = see; }

/* Whether a node is a global layer's: sliding-window layers with another base or scaling keep theirs. */
static bool is_global(const struct rope_setting *setting, const struct tensor *node, const struct rope_params *params) {
    if (params->freq_base != setting->freq_base || params->n_dims != setting->n_dims)
        return false;
    if (params->freq_scale == setting->native_scale)
        return true;
    const struct tensor *factors = node->src[2]; /* ours, if the node was set before: it has lost its own scale then */
    return factors != NULL && strncmp(factors->name, setting->factors->name, sizeof factors->name) == 0;
}

static void set_rope(struct rope_setting *setting, struct tensor *node) {
    if (node->src[2] == setting->factors)
        return; /* a reused graph still has what was set */
    struct rope_params params;
    memcpy(&params, node->op_params, sizeof params);
    if (!is_global(setting, node, &params))
        return;
    node->src[2] = setting->factors;
    params.freq_scale = 1.0f;
    params.ext_factor = 0.0f;
    params.attn_factor = setting->attention_factor;
    memcpy(node->op_params, &params, sizeof params);
    setting->touched++;
}

/* Turn a node into a CUSTOM one that calls `function`. An attention's parameters move behind the new ones, so that the
 * node of a reused graph still has them. */
static void take_over(struct context *context, struct tensor *node, custom_function function) {
    struct custom_params params = {.function = function, .n_tasks = -1, .userdata = context};
    memcpy(&params.attention, node->op_params, sizeof params.attention);
    memcpy(node->op_params, &params, sizeof params);
    node->op = context->watch.custom;
}

/* What llama_context_params.cb_eval is called with; `userdata` is the context. False: the graph is computed whole. */
EXPORT bool ropewalk_see(struct tensor *node, bool ask, void *userdata) {
    struct context *context = userdata;
    const struct watch *watch = &context->watch;
    if (watch->closely != NULL)
        return watch->closely(node, ask, NULL);
    if (node->op == watch->rope) {
        set_rope(watch->setting, node);
        see_rope(context, node);
    } else if (node->op == watch->attention && attention_covers(context, node))
        take_over(context, node, ropewalk_attention);
    else if (node->op == watch->attention && needs_window(context, node))
        fail(context, node, "this attention cannot be computed with a near window");
    else if (node->op == watch->write)
        see_write(context, node);
    else if (node->op == watch->product && product_covers(context, node))
        take_over(context, node, ropewalk_product);
    return false;
}

/* llama.cpp's abort callback, which it calls between nodes: whether to stop the graph. */
EXPORT bool ropewalk_must_stop(struct context *context) {
    return atomic_load(&context->stopped) || atomic_load(&context->failed);
}

EXPORT void ropewalk_stop(struct context *context, bool stop) { atomic_store(&context->stopped, stop); }
