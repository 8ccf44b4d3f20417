/* One context's state, made and freed; the instruction set it uses; failures; the layout as this side knows it. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct instruction_set *const sets[] = {
#if defined(__x86_64__)
    &avx512_bf16_set,
    &avx512_vnni_set,
    &avx512_set,
    &avx2_vnni_set,
    &avx2_set,
#endif
    &plain_set,
};

enum { N_SETS = sizeof sets / sizeof *sets };

/* The name of the instruction set number `index`, from the fastest on, if this processor has it; NULL past the last one,
 * and "" for one that it has not. */
EXPORT const char *ropewalk_instruction_set(int index) {
    if (index < 0 || index >= N_SETS)
        return NULL;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    return sets[index]->runs_here() ? sets[index]->name : "";
}

/* A new context that uses instruction set number `index`; NULL where there is no memory. */
EXPORT struct context *ropewalk_new(int index, bool exact) {
    struct context *context = aligned_alloc(64, (sizeof *context + 63) / 64 * 64);
    if (context == NULL)
        return NULL;
    memset(context, 0, sizeof *context);
    context->instructions = sets[index];
    context->exact = exact;
    context->types[TYPE_F32] = (struct block_type){1, 4, NULL, NULL};
    context->types[TYPE_F16] = context->types[TYPE_BF16] = (struct block_type){1, 2, NULL, NULL};
    context->partials = aligned_alloc(64, PARTIAL_FLOATS * sizeof(float)); /* touched only as far as it is used */
    if (context->partials == NULL) {
        free(context);
        return NULL;
    }
    return context;
}

EXPORT void ropewalk_free(struct context *context) {
    if (context == NULL)
        return;
    for (int i = 0; i < MAX_THREADS; i++)
        free(context->scratch[i].data);
    free(context->shared.data);
    free(context->partials);
    free_windows(context);
    free(context);
}

/* Tell how a type is stored. */
EXPORT void ropewalk_set_type(struct context *context, int type, int64_t block, int64_t bytes, dequantise_function dequantise,
                              quantise_function quantise) {
    context->types[type] = (struct block_type){block, bytes, dequantise, quantise};
}

/* Bytes that are allocated for the context's nodes. */
EXPORT int64_t ropewalk_bytes(const struct context *context) {
    int64_t floats = PARTIAL_FLOATS + context->shared.n_floats + window_floats(context);
    for (int i = 0; i < MAX_THREADS; i++)
        floats += context->scratch[i].n_floats;
    return floats * 4;
}

EXPORT int64_t ropewalk_taken(struct context *context) { return atomic_load(&context->taken); }

/* Why a node failed since this was last asked, "" if none did. */
EXPORT const char *ropewalk_failure(struct context *context) { return atomic_load(&context->failed) ? context->failure : ""; }

static void reset_claims(struct context *context, int n_threads) {
    for (int i = 0; i < n_threads; i++)
        atomic_store_explicit(&context->shares[i].next, 0, memory_order_relaxed);
    atomic_store(&context->claims.next, 0);
    atomic_store(&context->claims.done, 0);
    atomic_store(&context->claims.ready, 0);
    atomic_store(&context->claims.left, 0);
}

EXPORT void ropewalk_forgive(struct context *context) {
    reset_claims(context, MAX_THREADS);
    atomic_store(&context->failed, 0);
}

void fail(struct context *context, const struct tensor *node, const char *why) {
    int none = 0;
    if (!atomic_compare_exchange_strong(&context->failed, &none, 1))
        return; /* another thread's failure is the one to tell; it is read once all have left the graph */
    snprintf(context->failure, sizeof context->failure, "%.63s: %s", node->name, why);
}

float *reserve(struct context *context, struct scratch *scratch, int64_t n_floats, const struct tensor *node) {
    if (scratch->n_floats < n_floats) {
        free(scratch->data);
        scratch->data = aligned_alloc(64, (size_t)(n_floats * 4 + 63) / 64 * 64);
        scratch->n_floats = scratch->data ? n_floats : 0;
        if (scratch->data == NULL)
            fail(context, node, "out of memory");
    }
    return scratch->data;
}

void leave(struct context *context, int n_threads) {
    if (atomic_fetch_add(&context->claims.left, 1) + 1 < n_threads)
        return;
    reset_claims(context, n_threads);
    if (!atomic_load(&context->failed))
        atomic_fetch_add(&context->taken, 1);
}

/* Write where this side expects ggml's fields, in the order of `LAYOUT` in library.py; return how many there are. */
EXPORT int ropewalk_layout(int64_t *offsets) {
    const int64_t found[] = {
        offsetof(struct tensor, type),    offsetof(struct tensor, ne),       offsetof(struct tensor, nb),
        offsetof(struct tensor, op),      offsetof(struct tensor, op_params), offsetof(struct tensor, src),
        offsetof(struct tensor, view_src), offsetof(struct tensor, data),    offsetof(struct tensor, name),
        offsetof(struct tensor, extra),   sizeof(struct tensor),             offsetof(struct custom_params, function),
        offsetof(struct custom_params, userdata), offsetof(struct custom_params, attention),
        offsetof(struct rope_params, n_dims), offsetof(struct rope_params, freq_base),
        offsetof(struct rope_params, freq_scale), offsetof(struct rope_params, ext_factor),
        offsetof(struct rope_params, attn_factor), offsetof(struct rope_setting, factors),
        offsetof(struct rope_setting, touched), offsetof(struct rope_setting, freq_base),
        offsetof(struct rope_setting, native_scale), offsetof(struct rope_setting, attention_factor),
        offsetof(struct rope_setting, n_dims), sizeof(struct rope_setting),
        offsetof(struct key_cache, data), offsetof(struct key_cache, cell_bytes), offsetof(struct key_cache, n_heads),
        offsetof(struct key_cache, head_size), offsetof(struct key_cache, type), offsetof(struct key_cache, hadamard),
        sizeof(struct key_cache), offsetof(struct rotation_run, start), offsetof(struct rotation_run, stop),
        offsetof(struct rotation_run, before), offsetof(struct rotation_run, after), sizeof(struct rotation_run),
        offsetof(struct rotation, caches), offsetof(struct rotation, runs),
        offsetof(struct rotation, n_caches), offsetof(struct rotation, n_runs), offsetof(struct rotation, stop),
        offsetof(struct rotation, next), offsetof(struct rotation, n_dims), offsetof(struct rotation, freq_base),
        offsetof(struct rotation, scale), offsetof(struct rotation, halves), sizeof(struct rotation),
    };
    memcpy(offsets, found, sizeof found);
    return sizeof found / sizeof *found;
}
