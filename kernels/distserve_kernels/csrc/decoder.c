/* Decoder layers of the Llama family, a range of them per call, without returning to Python in between. */
#include "common.h"

typedef struct {
    const bf16 *input_norm, *post_attention_norm;
    const bf16 *q_norm, *k_norm; /* or NULL */
    Weight qkv, o_proj, gate_up, down;
    int64_t sliding_window; /* 0: none */
} Layer;

enum { ATTENTION_HALF = 1, MLP_HALF = 2 };

typedef struct {
    const Layer *layers;
    const bf16 *const *k_caches, *const *v_caches; /* per layer */
    int64_t first, last;
    int64_t halves; /* of the layers: what to run */
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    float eps, scale, softcap, unused;
    int64_t num_tokens, num_sequences;
    bf16 *hidden;  /* [T, hidden], the residual stream */
    bf16 *partial; /* [T, hidden]: takes a half's result instead of the residual stream; or NULL */
    const float *cos, *sin;
    int64_t rotary_dim;
    const int64_t *slots;
    const int32_t *block_tables, *query_starts, *context_lens;
    int64_t table_stride, k_block_stride, v_block_stride, block_size;
} Step;

typedef struct {
    const Step *step;
    const AttentionItem *items;
    int64_t num_items;
    int64_t *next_items; /* per layer */
    bf16 *normed, *qkv, *q, *attended, *activated;
    char *attention_scratch;
} Run;

/* Rows of tile operands start in different cache sets: no stride is a multiple of 4096 bytes. */
INLINE int64_t padded(int64_t columns) { return columns + 32; }

static int64_t qkv_columns(const Step *s) { return (s->num_heads + 2 * s->num_kv_heads) * s->head_dim; }

SIMD static void norm_rows(Team team, const Step *s, const bf16 *weight, bf16 *out) {
    int64_t begin, end;
    team_split(team, s->num_tokens, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        rms_norm_row(s->hidden + t * s->hidden_size, weight, s->eps, s->hidden_size, out + t * padded(s->hidden_size));
}

SIMD static void run_attention_half(Team team, const Run *run, int64_t index) {
    const Step *s = run->step;
    const Layer *layer = &s->layers[index];
    int64_t qkv_ld = padded(qkv_columns(s)), q_size = s->num_heads * s->head_dim, begin, end;
    norm_rows(team, s, layer->input_norm, run->normed);
    team_barrier(team);
    gemm(team, run->normed, padded(s->hidden_size), s->num_tokens, &layer->qkv, STORE_BF16, run->qkv, qkv_ld);
    team_barrier(team);
    RopeWrite rope = {
        .cos = s->cos, .sin = s->sin, .rotary_dim = s->rotary_dim, .slots = s->slots,
        .q_norm = layer->q_norm, .k_norm = layer->k_norm, .eps = s->eps,
        .k_cache = (bf16 *)s->k_caches[index], .v_cache = (bf16 *)s->v_caches[index],
        .k_block_stride = s->k_block_stride, .v_block_stride = s->v_block_stride, .block_size = s->block_size,
        .num_heads = s->num_heads, .num_kv_heads = s->num_kv_heads, .head_dim = s->head_dim,
    };
    team_split(team, s->num_tokens, &begin, &end);
    for (int64_t t = begin; t < end; t++) rope_write_row(&rope, t, run->qkv + t * qkv_ld, run->q + t * q_size);
    team_barrier(team);
    Attention a = {
        .q = run->q, .ldq = q_size, .k_cache = s->k_caches[index], .v_cache = s->v_caches[index],
        .k_block_stride = s->k_block_stride, .v_block_stride = s->v_block_stride,
        .block_tables = s->block_tables, .table_stride = s->table_stride, .query_starts = s->query_starts,
        .context_lens = s->context_lens, .num_sequences = s->num_sequences, .num_heads = s->num_heads,
        .num_kv_heads = s->num_kv_heads, .head_dim = s->head_dim, .block_size = s->block_size, .scale = s->scale,
        .softcap = s->softcap, .sliding_window = layer->sliding_window, .sinks = NULL, .out = run->attended,
        .ldo = padded(q_size),
    };
    attention(team, &a, run->items, run->num_items, &run->next_items[index - s->first],
              run->attention_scratch + team.id * attention_scratch_bytes());
    team_barrier(team);
    if (s->partial)
        gemm(team, run->attended, padded(q_size), s->num_tokens, &layer->o_proj, STORE_BF16, s->partial,
             s->hidden_size);
    else
        gemm(team, run->attended, padded(q_size), s->num_tokens, &layer->o_proj, ADD_BF16, s->hidden, s->hidden_size);
    team_barrier(team);
}

SIMD static void run_mlp_half(Team team, const Run *run, int64_t index) {
    const Step *s = run->step;
    const Layer *layer = &s->layers[index];
    norm_rows(team, s, layer->post_attention_norm, run->normed);
    team_barrier(team);
    gemm(team, run->normed, padded(s->hidden_size), s->num_tokens, &layer->gate_up, SILU_MUL, run->activated,
         padded(s->intermediate_size));
    team_barrier(team);
    if (s->partial)
        gemm(team, run->activated, padded(s->intermediate_size), s->num_tokens, &layer->down, STORE_BF16, s->partial,
             s->hidden_size);
    else
        gemm(team, run->activated, padded(s->intermediate_size), s->num_tokens, &layer->down, ADD_BF16, s->hidden,
             s->hidden_size);
    team_barrier(team);
}

static void run_layers(void *argument, Team team) {
    const Run *run = argument;
    const Step *s = run->step;
    for (int64_t index = s->first; index < s->last; index++) {
        if (s->halves & ATTENTION_HALF) run_attention_half(team, run, index);
        if (s->halves & MLP_HALF) run_mlp_half(team, run, index);
    }
}

static char *take(char **free_bytes, int64_t bytes) {
    char *taken = *free_bytes;
    *free_bytes += (bytes + 63) / 64 * 64;
    return taken;
}

/* Lays the buffers of a step out from `scratch` on; with NULL, only measures. */
static int64_t lay_out(const Step *s, int num_threads, char *scratch, Run *run) {
    Attention a = {.query_starts = s->query_starts, .num_sequences = s->num_sequences, .num_heads = s->num_heads,
                   .num_kv_heads = s->num_kv_heads};
    int64_t rows = (s->num_tokens + 2 * TILE - 1) / (2 * TILE) * (2 * TILE), q_size = s->num_heads * s->head_dim;
    char *p = scratch;
    run->step = s;
    run->num_items = attention_items(&a, NULL);
    run->items = (AttentionItem *)take(&p, run->num_items * (int64_t)sizeof(AttentionItem));
    run->next_items = (int64_t *)take(&p, (s->last - s->first) * 8);
    run->normed = (bf16 *)take(&p, rows * padded(s->hidden_size) * 2);
    run->qkv = (bf16 *)take(&p, rows * padded(qkv_columns(s)) * 2);
    run->q = (bf16 *)take(&p, rows * q_size * 2);
    run->attended = (bf16 *)take(&p, rows * padded(q_size) * 2);
    run->activated = (bf16 *)take(&p, rows * padded(s->intermediate_size) * 2);
    run->attention_scratch = take(&p, num_threads * attention_scratch_bytes());
    if (scratch) {
        attention_items(&a, (AttentionItem *)run->items);
        for (int64_t i = 0; i < s->last - s->first; i++) run->next_items[i] = 0;
    }
    return p - scratch;
}

EXPORT int64_t ds_decoder_scratch(const Step *step, int num_threads) {
    Run run;
    return lay_out(step, num_threads, NULL, &run);
}

EXPORT void ds_decoder_run(const Step *step, char *scratch, int num_threads) {
    Run run;
    lay_out(step, num_threads, scratch, &run);
    team_run(num_threads, run_layers, &run);
}
