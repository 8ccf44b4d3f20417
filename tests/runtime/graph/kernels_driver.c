/* The kernels without Python, for sanitizers: nodes of many kinds on several threads, against plain loops in double.
 *
 * Every buffer is allocated with exactly the bytes that its tensor has, so that a read beyond it is found. `make sanitize`
 * compiles this together with the kernels, and links ggml for its quantisation.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

struct traits {
    const char *name;
    int64_t block, interleave;
    size_t bytes;
    bool quantised;
    dequantise_function dequantise;
    quantise_function quantise;
};
const struct traits *ggml_get_type_traits(int type);
size_t ggml_quantize_chunk(int type, const float *from, void *to, int64_t start, int64_t rows, int64_t columns,
                           const float *importance);
void ggml_fp32_to_fp16_row(const float *from, uint16_t *to, int64_t n);

const char *ropewalk_instruction_set(int index);
struct context *ropewalk_new(int index, bool exact);
void ropewalk_free(struct context *context);
void ropewalk_set_type(struct context *context, int type, int64_t block, int64_t bytes, dequantise_function dequantise,
                       quantise_function quantise);
bool ropewalk_can_rotate(const struct context *context, const struct key_cache *cache, int64_t n_dims);
bool ropewalk_rotate(const struct context *context, struct rotation *rotation);
int64_t ropewalk_taken(struct context *context);
const char *ropewalk_failure(struct context *context);
void ropewalk_watch(struct context *context, const int *codes, struct rope_setting *setting);
bool ropewalk_set_window(struct context *context, int64_t tokens, int64_t start_tokens, int n_dims, bool halves,
                         float freq_base, const float *own, const float *far);
bool ropewalk_see(struct tensor *node, bool ask, void *userdata);

enum { ROPE = 1, ATTENTION, PRODUCT, CUSTOM, WRITE, RESHAPE, VIEW, PERMUTE, CONT, SCALE, COPY }; /* any codes will do */
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL = 20,
       IQ4_XS = 23, BF16 = 30, MXFP4 = 39 };

static uint64_t state = 88172645463325252u;

static float draw(void) { /* from -1 to 1 */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (float)(int32_t)(state >> 32) * 0x1p-31f;
}

static void *allocate(size_t bytes) {
    void *data = malloc(bytes ? bytes : 1);
    if (data == NULL)
        abort();
    return data;
}

/* A tensor of `type` whose rows of ne[0] values are drawn; `values` are what it holds. */
struct drawn {
    struct tensor tensor;
    float *values;
};

static struct drawn *drawn(int type, int64_t a, int64_t b, int64_t c, int64_t d) {
    struct drawn *x = calloc(1, sizeof *x);
    const struct traits *traits = ggml_get_type_traits(type);
    int64_t n = a * b * c * d;
    size_t bytes = (size_t)(n / traits->block) * traits->bytes;
    x->values = allocate((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        x->values[i] = draw() * 2.0f;
    x->tensor.type = type;
    x->tensor.data = allocate(bytes);
    if (type == F32) {
        memcpy(x->tensor.data, x->values, bytes);
    } else {
        ggml_quantize_chunk(type, x->values, x->tensor.data, 0, n / a, a, NULL);
        traits->dequantise(x->tensor.data, x->values, n);
    }
    memcpy(x->tensor.ne, (int64_t[]){a, b, c, d}, sizeof x->tensor.ne);
    x->tensor.nb[0] = traits->bytes;
    x->tensor.nb[1] = (size_t)(a / traits->block) * traits->bytes;
    x->tensor.nb[2] = x->tensor.nb[1] * (size_t)b;
    x->tensor.nb[3] = x->tensor.nb[2] * (size_t)c;
    return x;
}

/* As llama.cpp's permuted views: rows (or cells) before heads in memory, heads before rows in the tensor. */
static struct drawn *permuted(struct drawn *x) {
    int64_t heads = x->tensor.ne[1];
    size_t step = x->tensor.nb[1];
    x->tensor.ne[1] = x->tensor.ne[2], x->tensor.nb[1] = x->tensor.nb[2];
    x->tensor.ne[2] = heads, x->tensor.nb[2] = step;
    return x;
}

static void release(struct drawn *x) {
    if (x == NULL)
        return;
    free(x->tensor.data);
    free(x->values);
    free(x);
}

struct task {
    struct tensor *node;
    int thread, n_threads, times;
    pthread_barrier_t *barrier;
};

static void *work(void *argument) {
    struct task *task = argument;
    struct custom_params params;
    memcpy(&params, task->node->op_params, sizeof params);
    for (int i = 0; i < task->times; i++) { /* a node after the other, with ggml's barrier between them */
        params.function(task->node, task->thread, task->n_threads, params.userdata);
        pthread_barrier_wait(task->barrier);
    }
    return NULL;
}

static void compute(struct tensor *node, int n_threads) {
    pthread_t threads[16];
    struct task tasks[16];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, (unsigned)n_threads);
    for (int i = 0; i < n_threads; i++) {
        tasks[i] = (struct task){node, i, n_threads, 3, &barrier};
        if (pthread_create(&threads[i], NULL, work, &tasks[i]) != 0)
            abort();
    }
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
}

static int n_failed, n_checked;

/* Compute on one thread and on several, which must give the same, and compare with `expected`. */
static void check(struct context *context, struct tensor *node, const double *expected, int64_t n, double tolerance,
                  const char *what) {
    float *first = allocate((size_t)n * 4);
    double worst = 0.0, squares = 0.0;
    compute(node, 1);
    memcpy(first, node->data, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) {
        double difference = fabs((double)first[i] - expected[i]);
        worst = difference <= worst ? worst : difference;
        squares += expected[i] * expected[i];
    }
    bool same = true;
    for (int n_threads = 2; n_threads <= 5; n_threads += 3) {
        memset(node->data, 0xff, (size_t)n * 4);
        compute(node, n_threads);
        same = same && memcmp(first, node->data, (size_t)n * 4) == 0;
    }
    bool right = worst <= tolerance * (sqrt(squares / (double)n) + 1e-3) && ropewalk_failure(context)[0] == 0;
    n_checked++;
    if (!right || !same) {
        n_failed++;
        printf("%s: off by %g; %s on several threads %s\n", what, worst, same ? "the same" : "something else",
               ropewalk_failure(context));
    }
    free(first);
}

struct shape {
    int64_t rows, cells, heads, kv_heads, k_size, v_size, streams;
    float max_bias, softcap;
    bool masked, sinks;
};

static double slope(const struct shape *s, int64_t head) {
    if (s->max_bias == 0.0f)
        return 1.0;
    int64_t power = 1;
    while (power * 2 <= s->heads)
        power *= 2;
    return head < power ? pow(2.0, -s->max_bias / (double)power * (double)(head + 1))
                        : pow(2.0, -s->max_bias / 2.0 / (double)power * (double)(2 * (head - power) + 1));
}

/* out[stream][row][head][i], in double. */
static void plain_attention(const struct shape *s, const float *q, const float *k, const float *v, const float *mask,
                            const float *sinks, double scale, double *out) {
    double *weights = allocate((size_t)s->cells * 8);
    for (int64_t stream = 0; stream < s->streams; stream++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t head = 0; head < s->heads; head++) {
                int64_t kv_head = head / (s->heads / s->kv_heads);
                const float *query = q + ((stream * s->rows + row) * s->heads + head) * s->k_size;
                double greatest = sinks ? sinks[head] : -INFINITY, sum = 0.0;
                for (int64_t cell = 0; cell < s->cells; cell++) {
                    const float *key = k + ((stream * s->cells + cell) * s->kv_heads + kv_head) * s->k_size;
                    double score = 0.0;
                    for (int64_t i = 0; i < s->k_size; i++)
                        score += (double)query[i] * key[i];
                    score *= scale;
                    if (s->softcap != 0.0f)
                        score = s->softcap * tanh(score / s->softcap);
                    if (mask)
                        score += slope(s, head) * mask[(stream * s->rows + row) * s->cells + cell];
                    weights[cell] = score;
                    greatest = score > greatest ? score : greatest;
                }
                double *to = out + ((stream * s->rows + row) * s->heads + head) * s->v_size;
                memset(to, 0, (size_t)s->v_size * 8);
                if (greatest == -INFINITY)
                    continue;
                sum = sinks ? exp(sinks[head] - greatest) : 0.0;
                for (int64_t cell = 0; cell < s->cells; cell++) {
                    const float *value = v + ((stream * s->cells + cell) * s->kv_heads + kv_head) * s->v_size;
                    double weight = exp(weights[cell] - greatest);
                    sum += weight;
                    for (int64_t i = 0; i < s->v_size; i++)
                        to[i] += weight * value[i];
                }
                for (int64_t i = 0; i < s->v_size; i++)
                    to[i] /= sum;
            }
    free(weights);
}

static void check_attention(struct context *context, const struct shape *s, int type_k, int type_v) {
    struct drawn *q = permuted(drawn(F32, s->k_size, s->heads, s->rows, s->streams));
    struct drawn *k = permuted(drawn(type_k, s->k_size, s->kv_heads, s->cells, s->streams));
    struct drawn *v = permuted(drawn(type_v, s->v_size, s->kv_heads, s->cells, s->streams));
    struct drawn *out = drawn(F32, s->v_size, s->heads, s->rows, s->streams);
    struct drawn *mask = s->masked ? drawn(F16, s->cells, s->rows, 1, s->streams) : NULL;
    struct drawn *sinks = s->sinks ? drawn(F32, s->heads, 1, 1, 1) : NULL;
    int64_t n = s->v_size * s->heads * s->rows * s->streams, seen = s->cells - s->rows;
    double *expected = allocate((size_t)n * 8);
    int64_t n_mask = mask ? s->cells * s->rows * s->streams : 0;
    for (int64_t i = 0; i < n_mask; i++) { /* causal, with every seventh cell hidden, and biased by distance for ALiBi */
        int64_t distance = seen + i / s->cells % s->rows - i % s->cells;
        mask->values[i] = distance < 0 || i % 7 == 0 ? -INFINITY : s->max_bias != 0.0f ? -(float)distance : 0.0f;
    }
    if (mask)
        ggml_fp32_to_fp16_row(mask->values, (uint16_t *)mask->tensor.data, n_mask);
    float scale = 1.0f / sqrtf((float)s->k_size);
    struct attention_params params = {scale, s->max_bias, s->softcap};
    struct tensor *node = &out->tensor;
    node->op = ATTENTION;
    memcpy(node->op_params, &params, sizeof params);
    node->src[0] = &q->tensor, node->src[1] = &k->tensor, node->src[2] = &v->tensor;
    node->src[3] = mask ? &mask->tensor : NULL, node->src[4] = sinks ? &sinks->tensor : NULL;
    plain_attention(s, q->values, k->values, v->values, mask ? mask->values : NULL, sinks ? sinks->values : NULL, scale, expected);
    char what[160];
    snprintf(what, sizeof what, "attention of %d rows over %d cells, heads %d:%d of %d, types %d:%d, cap %g, %s", (int)s->rows,
             (int)s->cells, (int)s->heads, (int)s->kv_heads, (int)s->k_size, type_k, type_v, s->softcap,
             context->exact ? "exact" : "fast");
    ropewalk_see(node, true, context);
    if (node->op != CUSTOM) {
        printf("%s: not covered\n", what);
        n_failed++;
    } else {
        check(context, node, expected, n, context->exact ? 2e-4 : 5e-2, what);
    }
    free(expected);
    struct drawn *all[] = {q, k, v, out, mask, sinks};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

/* Turn pairs of neighbours by `times` the angles. */
static void turn_by(double *x, const double *angles, int64_t half, double times) {
    for (int64_t i = 0; i < half; i++) {
        double a = x[2 * i], b = x[2 * i + 1], c = cos(angles[i] * times), s = sin(angles[i] * times);
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = b * c + a * s;
    }
}

enum { WINDOW = 70, WINDOWED_CELLS = 330 };

/* What a row sees of a cell: `q` and `k` as they come from the far rotation. */
static double windowed_score(const float *q, const float *k, int64_t size, const double *angles, int64_t row, int64_t cell) {
    double query[256], key[256], score = 0.0;
    bool near = row - cell < WINDOW;
    for (int64_t i = 0; i < size; i++)
        query[i] = q[i], key[i] = k[i];
    turn_by(query, angles, size / 2, near ? (double)row : WINDOW);
    turn_by(key, angles, size / 2, near ? (double)cell : 0.0);
    for (int64_t i = 0; i < size; i++)
        score += query[i] * key[i];
    return score;
}

/* A near window over cells that were written in an order of their own. */
static void check_window(struct context *context, struct rope_setting *setting, int type, int64_t rows, int64_t size) {
    enum { HEADS = 4, KV_HEADS = 2 };
    int64_t half = size / 2, first = WINDOWED_CELLS - rows;
    struct drawn *q = drawn(F32, size, HEADS, rows, 1), *k = drawn(type, size, KV_HEADS, WINDOWED_CELLS, 1);
    struct drawn *v = permuted(drawn(F16, size, KV_HEADS, WINDOWED_CELLS, 1)), *out = drawn(F32, size, HEADS, rows, 1);
    struct drawn *mask = drawn(F16, WINDOWED_CELLS, rows, 1, 1);
    int32_t *positions = allocate(WINDOWED_CELLS * 4);
    int64_t *cells = allocate(WINDOWED_CELLS * 8);
    float *own = allocate((size_t)half * 4), *far = allocate((size_t)half * 4);
    double *angles = allocate((size_t)half * 8), *expected = allocate((size_t)(rows * HEADS * size) * 8);
    for (int64_t i = 0; i < half; i++) {
        own[i] = 1.0f, far[i] = 2.0f + (float)i / (float)half;
        angles[i] = pow(setting->freq_base, -(double)i / (double)half) * (1.0 / own[i] - 1.0 / far[i]);
    }
    for (int64_t i = 0; i < WINDOWED_CELLS; i++)
        positions[i] = (int32_t)i, cells[i] = (i * 7) % WINDOWED_CELLS;
    ropewalk_set_window(context, WINDOW, 0, (int)size, false, setting->freq_base, own, far);
    struct tensor cache = k->tensor, keys = permuted(k)->tensor, index = {.type = TYPE_I64, .data = (char *)cells};
    cache.ne[0] *= cache.ne[1], cache.ne[1] = cache.ne[2], cache.ne[2] = 1, cache.nb[1] = cache.nb[2];
    keys.op = PERMUTE, keys.view_src = &cache, keys.src[0] = &cache;
    struct tensor at = {.type = TYPE_I32, .ne = {WINDOWED_CELLS, 1, 1, 1}, .data = (char *)positions};
    memcpy(index.ne, at.ne, sizeof at.ne);
    struct rope_params rope = {.n_dims = (int32_t)size, .freq_base = setting->freq_base, .freq_scale = setting->native_scale};
    struct tensor raw = q->tensor, rotated = q->tensor, write = {.op = WRITE, .view_src = &cache};
    rotated.op = ROPE, rotated.src[0] = &raw, rotated.src[1] = &at;
    memcpy(rotated.op_params, &rope, sizeof rope);
    write.src[0] = &rotated, write.src[1] = &index;
    int dims = setting->n_dims;
    setting->n_dims = (int32_t)size;
    ropewalk_see(&rotated, true, context); /* all tokens are written, as by graphs before */
    ropewalk_see(&write, true, context);
    at.ne[0] = rows, at.data = (char *)(positions + first);
    ropewalk_see(&rotated, true, context);
    struct tensor queries = permuted(q)->tensor, *node = &out->tensor;
    queries.op = PERMUTE, queries.src[0] = &rotated;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < WINDOWED_CELLS; i++)
            mask->values[row * WINDOWED_CELLS + cells[i]] = i <= first + row ? 0.0f : -INFINITY;
    ggml_fp32_to_fp16_row(mask->values, (uint16_t *)mask->tensor.data, rows * WINDOWED_CELLS);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < HEADS; head++) {
            double sum = 0.0, *to = expected + (row * HEADS + head) * size;
            memset(to, 0, (size_t)size * 8);
            for (int64_t i = 0; i <= first + row; i++) {
                int64_t where = (cells[i] * KV_HEADS + head / (HEADS / KV_HEADS)) * size;
                double score = windowed_score(q->values + (row * HEADS + head) * size, k->values + where, size, angles,
                                              first + row, i);
                double weight = exp(score / sqrt((double)size));
                sum += weight;
                for (int64_t j = 0; j < size; j++)
                    to[j] += weight * v->values[where + j];
            }
            for (int64_t j = 0; j < size; j++)
                to[j] /= sum;
        }
    struct attention_params params = {1.0f / sqrtf((float)size), 0.0f, 0.0f};
    node->op = ATTENTION;
    memcpy(node->op_params, &params, sizeof params);
    node->src[0] = &queries, node->src[1] = &keys, node->src[2] = &v->tensor, node->src[3] = &mask->tensor;
    char what[120];
    snprintf(what, sizeof what, "near window, %d rows of %d, type %d, %s", (int)rows, (int)size, type,
             context->exact ? "exact" : "fast");
    ropewalk_see(node, true, context);
    check(context, node, expected, rows * HEADS * size, context->exact ? 5e-4 : 5e-2, what);
    setting->n_dims = dims;
    setting->touched = 0;
    ropewalk_set_window(context, 0, 0, 0, false, 0.0f, own, far);
    free(positions), free(cells), free(own), free(far), free(angles), free(expected);
    struct drawn *all[] = {q, k, v, out, mask};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

static void check_product(struct context *context, int type, int64_t n_in, int64_t n_out, int64_t n_rows) {
    struct drawn *weight = drawn(type, n_in, n_out, 1, 1), *x = drawn(F32, n_in, n_rows, 1, 1);
    struct drawn *out = drawn(F32, n_out, n_rows, 1, 1);
    double *expected = allocate((size_t)(n_out * n_rows) * 8);
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t column = 0; column < n_out; column++) {
            double sum = 0.0;
            for (int64_t i = 0; i < n_in; i++)
                sum += (double)weight->values[column * n_in + i] * x->values[row * n_in + i];
            expected[row * n_out + column] = sum;
        }
    struct tensor *node = &out->tensor;
    node->op = PRODUCT;
    node->src[0] = &weight->tensor, node->src[1] = &x->tensor;
    char what[120];
    snprintf(what, sizeof what, "product of type %d, %d to %d, %d rows, %s", type, (int)n_in, (int)n_out, (int)n_rows,
             context->exact ? "exact" : "fast");
    ropewalk_see(node, true, context);
    if (node->op == CUSTOM) /* llama.cpp keeps the others */
        check(context, node, expected, n_out * n_rows, context->exact ? 1e-4 : 1e-1, what);
    free(expected);
    release(weight), release(x), release(out);
}

static void check_rope(struct context *context, struct rope_setting *setting) {
    struct drawn *x = drawn(F32, 8, 2, 2, 1);
    struct rope_params params = {.n_dims = 8, .freq_base = 1e4f, .freq_scale = 0.5f};
    x->tensor.op = ROPE;
    memcpy(x->tensor.op_params, &params, sizeof params);
    for (int i = 0; i < 2; i++) /* the second time there is nothing to do */
        ropewalk_see(&x->tensor, true, context);
    memcpy(&params, x->tensor.op_params, sizeof params);
    n_checked++;
    n_failed += setting->touched != 1 || params.attn_factor != 1.5f || x->tensor.src[2] != setting->factors;
    setting->touched = 0;
    release(x);
}

struct rotating {
    struct context *context;
    struct rotation *rotation;
};

static void *rotate_on_thread(void *argument) {
    struct rotating *work = argument;
    return ropewalk_rotate(work->context, work->rotation) ? work : NULL;
}

/* Rotate a cache there and back: what it held comes out, but for two roundings. */
static void check_rotation(struct context *context, int type, int64_t heads, int64_t size, int n_dims, int hadamard, bool halves) {
    enum { CELLS = 75, THREADS = 3 };
    struct drawn *keys = drawn(type, size, heads, CELLS, 1);
    struct key_cache cache = {keys->tensor.data, (int64_t)keys->tensor.nb[2], heads, size, type, hadamard};
    float *factors = allocate((size_t)n_dims * 4), *ones = factors + n_dims / 2;
    for (int i = 0; i < n_dims / 2; i++)
        factors[i] = 1.0f + (float)i * 0.1f, ones[i] = 1.0f;
    bool right = ropewalk_can_rotate(context, &cache, n_dims);
    for (int back = 0; back < 2; back++) {
        struct rotation_run run = {3, CELLS, back ? factors : ones, back ? ones : factors};
        struct rotation rotation = {.caches = &cache, .runs = &run, .n_caches = 1, .n_runs = 1, .stop = CELLS,
                                    .n_dims = n_dims, .freq_base = 1e4f, .scale = back ? 0.5f : 2.0f, .halves = halves};
        struct rotating work = {context, &rotation};
        pthread_t threads[THREADS];
        for (int i = 0; i < THREADS; i++)
            pthread_create(&threads[i], NULL, rotate_on_thread, &work);
        for (int i = 0; i < THREADS; i++) {
            void *result;
            pthread_join(threads[i], &result);
            right = right && result != NULL;
        }
    }
    int64_t n = size * heads * CELLS;
    float *found = allocate((size_t)n * 4);
    if (type == F32)
        memcpy(found, keys->tensor.data, (size_t)n * 4);
    else
        ggml_get_type_traits(type)->dequantise(keys->tensor.data, found, n);
    double squares = 0.0, errors = 0.0;
    for (int64_t i = 0; i < n; i++) {
        squares += (double)keys->values[i] * keys->values[i];
        errors += ((double)found[i] - keys->values[i]) * ((double)found[i] - keys->values[i]);
    }
    n_checked++;
    if (!right || !(errors < 0.04 * squares)) {
        n_failed++;
        printf("rotation of type %d, %d of %d dimensions: error %g\n", type, n_dims, (int)size, sqrt(errors / squares));
    }
    free(found);
    free(factors);
    release(keys);
}

static void check_all(int index, bool exact) {
    static const struct shape shapes[] = {
        {1, 300, 9, 3, 64, 64, 1, 0.0f, 0.0f, true, false},   {1, 1100, 6, 2, 64, 64, 2, 0.0f, 0.0f, true, true},
        {5, 257, 4, 4, 128, 96, 1, 0.0f, 20.0f, true, false}, {70, 300, 6, 2, 64, 64, 1, 8.0f, 0.0f, true, false},
        {40, 130, 4, 1, 96, 64, 2, 0.0f, 30.0f, true, true},  {33, 65, 8, 1, 256, 256, 1, 0.0f, 0.0f, false, false},
        {17, 40, 2, 1, 576, 512, 1, 0.0f, 0.0f, true, false}, {2, 31, 3, 1, 32, 32, 1, 0.0f, 0.0f, true, false},
    };
    static const int cached[] = {F32, F16, BF16, Q8_0, Q5_1, Q5_0, IQ4_NL, Q4_1, Q4_0};
    static const int stored[] = {F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4};
    enum { N_SHAPES = sizeof shapes / sizeof *shapes, N_CACHED = sizeof cached / sizeof *cached };
    struct context *context = ropewalk_new(index, exact);
    struct drawn *factors = drawn(F32, 4, 1, 1, 1);
    strcpy(factors->tensor.name, "factors");
    struct rope_setting setting = {&factors->tensor, 0, 1e4f, 0.5f, 1.5f, 8};
    for (int type = 0; type < 40; type++) {
        const struct traits *traits = ggml_get_type_traits(type);
        if (traits->block > 1 && traits->dequantise)
            ropewalk_set_type(context, type, traits->block, (int64_t)traits->bytes, traits->dequantise, traits->quantise);
        else if (type == F16 || type == BF16)
            ropewalk_set_type(context, type, 1, 2, NULL, traits->quantise);
    }
    static const int codes[] = {ROPE, ATTENTION, PRODUCT, CUSTOM, WRITE, RESHAPE, VIEW, PERMUTE, CONT, SCALE, COPY};
    ropewalk_watch(context, codes, &setting);
    check_rope(context, &setting);
    for (int i = 0; i < N_SHAPES; i++)
        for (int j = 0; j < N_CACHED; j++)
            check_attention(context, &shapes[i], cached[j], cached[(j + i) % N_CACHED]);
    for (int j = 0; j < N_CACHED; j++)
        for (int64_t rows = 1; rows <= 41; rows += 20) {
            check_window(context, &setting, cached[j], rows, 64);
            check_window(context, &setting, cached[j], rows, 96);
        }
    for (size_t i = 0; i < sizeof stored / sizeof *stored; i++) {
        check_product(context, stored[i], 512, 70, 33);
        check_product(context, stored[i], 768, 33, 130);
        for (int64_t rows = 1; rows <= 5; rows += 2) /* and rows that do not end with a group of 256 */
            for (int64_t n_in = 512; n_in >= (ggml_get_type_traits(stored[i])->block > 32 ? 512 : 32); n_in -= 96)
                check_product(context, stored[i], n_in, 19, rows);
        check_product(context, stored[i], 512, 70, 1);
        check_product(context, stored[i], 768, 300, 5);
    }
    for (int j = 0; j < N_CACHED; j++)
        for (int halves = 0; halves < 2; halves++) {
            check_rotation(context, cached[j], 3, 64, 64, 64, halves);
            check_rotation(context, cached[j], 2, 96, 36, 0, halves);
            check_rotation(context, cached[j], 1, 256, 256, 128, halves);
        }
    release(factors);
    ropewalk_free(context);
}

int main(void) {
    const char *name;
    for (int index = 0; (name = ropewalk_instruction_set(index)) != NULL; index++)
        for (int exact = 0; name[0] && exact < 2; exact++) {
            check_all(index, exact);
            printf("%s%s: %d checks, %d failed\n", name, exact ? ", exact" : "", n_checked, n_failed);
            fflush(stdout);
        }
    return n_failed != 0;
}
