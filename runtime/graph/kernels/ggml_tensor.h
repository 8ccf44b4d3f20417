/* The parts of ggml's memory that the kernels read: the C side of `TensorStruct` and its parameters in ggml.py.
 *
 * Nothing else in this folder knows where ggml keeps a field. When the library is loaded, `ropewalk_layout` is compared
 * with the Python side, which is verified in its turn on tensors created by ggml itself.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_I32 = 26, TYPE_I64 = 27, TYPE_BF16 = 30, N_TYPES = 64 };

struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4]; /* values along each dimension */
    size_t nb[4];  /* bytes from one to the next along each dimension */
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[10];
    struct tensor *view_src;
    size_t view_offs;
    char *data;
    char name[64];
    void *extra;
    char padding[8];
};

/* A FLASH_ATTN_EXT node's parameters. */
struct attention_params {
    float scale, max_bias, logit_softcap;
};

/* A ROPE node's parameters. */
struct rope_params {
    int32_t n_past, n_dims, mode, n_ctx, n_ctx_orig;
    float freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow;
};

typedef void (*custom_function)(struct tensor *node, int thread, int n_threads, void *userdata);

/* A CUSTOM node's parameters, and behind them those of the attention that it was. In a node they lie at an address that
 * pointers are not aligned to, so that the compiler must be told. */
struct __attribute__((packed, aligned(4))) custom_params {
    custom_function function;
    int n_tasks, padding;
    void *userdata;
    struct attention_params attention;
};

static inline struct custom_params *custom_params(struct tensor *node) { return (struct custom_params *)node->op_params; }

typedef void (*dequantise_function)(const void *blocks, float *out, int64_t n);

typedef void (*quantise_function)(const float *values, void *blocks, int64_t n);

/* How a type is stored: `block` values in `block_bytes`. Without `dequantise`, the type cannot be read, unless it is one
 * of single values; without `quantise`, it cannot be written. */
struct block_type {
    int64_t block, block_bytes;
    dequantise_function dequantise;
    quantise_function quantise;
};
