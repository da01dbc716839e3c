/* Work on single rows: norms, rotary positions, cache writes, the MLP's gate. */
#include "common.h"

SIMD static float sum_of_squares(const bf16 *x, int64_t n) {
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512 a = load_bf16(x + i), b = load_bf16(x + i + 16);
        sum0 = _mm512_fmadd_ps(a, a, sum0);
        sum1 = _mm512_fmadd_ps(b, b, sum1);
    }
    for (; i < n; i += 16) {
        __m512 a = load_bf16_masked(x + i, n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1));
        sum0 = _mm512_fmadd_ps(a, a, sum0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

SIMD void rms_norm_row(const bf16 *x, const bf16 *weight, float eps, int64_t n, bf16 *out) {
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(sum_of_squares(x, n) / (float)n + eps));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load_bf16(x + i), factor), load_bf16(weight + i)));
    if (i < n) {
        __mmask16 mask = (__mmask16)((1u << (n - i)) - 1);
        __m512 y = _mm512_mul_ps(_mm512_mul_ps(load_bf16_masked(x + i, mask), factor),
                                 load_bf16_masked(weight + i, mask));
        store_bf16_masked(out + i, y, mask);
    }
}

/* Normalises (if norm) and rotates one head; halves are rotary_dim / 2 apart, the rest is copied. */
SIMD static void rotate_head(const bf16 *x, const float *cos, const float *sin, int64_t rotary_dim, int64_t head_dim,
                             const bf16 *norm, float eps, bf16 *out) {
    bf16 normed[512];
    if (norm) {
        rms_norm_row(x, norm, eps, head_dim, normed);
        x = normed;
    }
    int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        __mmask16 mask = half - i >= 16 ? 0xffff : (__mmask16)((1u << (half - i)) - 1);
        __m512 a = load_bf16_masked(x + i, mask), b = load_bf16_masked(x + half + i, mask);
        __m512 cos_a = _mm512_maskz_loadu_ps(mask, cos + i), cos_b = _mm512_maskz_loadu_ps(mask, cos + half + i);
        __m512 sin_a = _mm512_maskz_loadu_ps(mask, sin + i), sin_b = _mm512_maskz_loadu_ps(mask, sin + half + i);
        store_bf16_masked(out + i, _mm512_fmsub_ps(a, cos_a, _mm512_mul_ps(b, sin_a)), mask);
        store_bf16_masked(out + half + i, _mm512_fmadd_ps(b, cos_b, _mm512_mul_ps(a, sin_b)), mask);
    }
    for (int64_t i = rotary_dim; i < head_dim; i++) out[i] = x[i];
}

SIMD void rope_write_row(const RopeWrite *r, int64_t token, const bf16 *qkv, bf16 *q) {
    int64_t d = r->head_dim, kv_size = r->num_kv_heads * d;
    int64_t block = r->slots[token] / r->block_size, offset = r->slots[token] % r->block_size;
    const float *cos = r->cos + token * r->rotary_dim, *sin = r->sin + token * r->rotary_dim;
    bf16 *k = r->k_cache + block * r->k_block_stride + offset * kv_size;
    bf16 *v = r->v_cache + block * r->v_block_stride + offset * kv_size;
    for (int64_t h = 0; h < r->num_heads; h++)
        rotate_head(qkv + h * d, cos, sin, r->rotary_dim, d, r->q_norm, r->eps, q + h * d);
    qkv += r->num_heads * d;
    for (int64_t h = 0; h < r->num_kv_heads; h++)
        rotate_head(qkv + h * d, cos, sin, r->rotary_dim, d, r->k_norm, r->eps, k + h * d);
    qkv += kv_size;
    __builtin_memcpy(v, qkv, (size_t)kv_size * sizeof(bf16));
}

/* ---- entry points over whole batches ---- */

typedef struct {
    const bf16 *x, *weight;
    bf16 *residual, *out;
    int64_t ldx, rows, n;
    float eps;
} NormCall;

SIMD static void norm_body(void *argument, Team team) {
    const NormCall *c = argument;
    int64_t begin, end;
    team_split(team, c->rows, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const bf16 *x = c->x + row * c->ldx;
        if (c->residual) {
            bf16 *sum = c->residual + row * c->n;
            for (int64_t i = 0; i < c->n; i += 16) {
                __mmask16 mask = c->n - i >= 16 ? 0xffff : (__mmask16)((1u << (c->n - i)) - 1);
                __m512 y = _mm512_add_ps(load_bf16_masked(x + i, mask), load_bf16_masked(sum + i, mask));
                store_bf16_masked(sum + i, y, mask);
            }
            x = sum;
        }
        rms_norm_row(x, c->weight, c->eps, c->n, c->out + row * c->n);
    }
}

/* out = rms_norm(x) or, with a residual, residual += x and out = rms_norm(residual); all but x contiguous. */
EXPORT void ds_rms_norm(const bf16 *x, int64_t ldx, bf16 *residual, const bf16 *weight, float eps, int64_t rows,
                        int64_t n, bf16 *out, int num_threads) {
    NormCall call = {x, weight, residual, out, ldx, rows, n, eps};
    team_run(num_threads, norm_body, &call);
}

typedef struct {
    const bf16 *x;
    bf16 *out;
    int64_t ldx, rows, n;
} GateCall;

SIMD static void gate_body(void *argument, Team team) {
    const GateCall *c = argument;
    int64_t begin, end;
    team_split(team, c->rows, &begin, &end);
    for (int64_t row = begin; row < end; row++)
        for (int64_t i = 0; i < c->n; i += 16) {
            __mmask16 mask = c->n - i >= 16 ? 0xffff : (__mmask16)((1u << (c->n - i)) - 1);
            const bf16 *x = c->x + row * c->ldx + i;
            __m512 gate = load_bf16_masked(x, mask), up = load_bf16_masked(x + c->n, mask);
            store_bf16_masked(c->out + row * c->n + i, _mm512_mul_ps(silu_ps(gate), up), mask);
        }
}

/* out [rows, n] = silu(x[:, :n]) * x[:, n:]. */
EXPORT void ds_silu_mul(const bf16 *x, int64_t ldx, int64_t rows, int64_t n, bf16 *out, int num_threads) {
    GateCall call = {x, out, ldx, rows, n};
    team_run(num_threads, gate_body, &call);
}

typedef struct {
    const RopeWrite *rope;
    const bf16 *qkv;
    bf16 *q;
    int64_t ldx, rows;
} RopeCall;

SIMD static void rope_body(void *argument, Team team) {
    const RopeCall *c = argument;
    int64_t begin, end;
    team_split(team, c->rows, &begin, &end);
    for (int64_t row = begin; row < end; row++)
        rope_write_row(c->rope, row, c->qkv + row * c->ldx, c->q + row * c->rope->num_heads * c->rope->head_dim);
}

EXPORT void ds_rope_write(const RopeWrite *rope, const bf16 *qkv, int64_t ldx, int64_t rows, bf16 *q,
                          int num_threads) {
    RopeCall call = {rope, qkv, q, ldx, rows};
    team_run(num_threads, rope_body, &call);
}
