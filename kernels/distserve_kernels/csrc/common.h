/* Shared by the native CPU kernels: number formats, vector helpers, threads, and what the files offer each other.
 *
 * Everything works on bfloat16 stored as uint16_t with float32 arithmetic. Every vector function carries SIMD (or
 * SIMD_AMX), so that the library itself loads on any x86-64 machine and `ds_cpu_level` decides what may be called.
 */
#ifndef DISTSERVE_KERNELS_COMMON_H
#define DISTSERVE_KERNELS_COMMON_H

#include <immintrin.h>
#include <stdint.h>
#include <stddef.h>

#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define SIMD_AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef uint16_t bf16;

enum { LEVEL_NONE = 0, LEVEL_AVX512 = 1, LEVEL_AMX = 2 };

/* Rows and columns of every tile: 16 rows of 64 bytes. */
enum { TILE = 16, TILE_K = 32, PANEL = 16 };

/* ---- threads: team.c ---- */

typedef struct {
    int id, size;
} Team;

typedef void (*TeamBody)(void *argument, Team team);

extern int ds_level; /* what this process may execute, one of LEVEL_* */

/* Runs body on up to num_threads threads of torch's own OpenMP pool. */
void team_run(int num_threads, TeamBody body, void *argument);
/* All members of the team that is running have arrived. */
void team_barrier(Team team);
/* Must precede the first tile instruction of a thread's body. */
void tiles_configure(void);
void tiles_release(void);

INLINE void team_split(Team team, long total, long *begin, long *end) {
    *begin = total * team.id / team.size;
    *end = total * (team.id + 1) / team.size;
}

/* ---- vectors ---- */

INLINE SIMD __m512 load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE SIMD __m512 load_bf16_masked(const bf16 *p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

INLINE SIMD __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE SIMD void store_bf16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, to_bf16(x)); }

INLINE SIMD void store_bf16_masked(bf16 *p, __m512 x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask, to_bf16(x));
}

/* 2^x for x <= 128, relative error below 2e-7; -inf gives 0 (Taylor coefficients of 2^f on [-0.5, 0.5]). */
INLINE SIMD __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-160.0f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530393381609e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558146428443e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291076284772e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504108664821580e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022650695910072e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718055994531e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

#define LOG2E 1.4426950408889634f

INLINE SIMD __m512 silu_ps(__m512 x) {
    __m512 e = exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* ---- matrices: gemm.c ---- */

/* A weight [n, k] packed for x @ w.T: panels of 16 outputs, in each one tile of 16 pairs x 16 outputs x 2 per 32
 * inputs, which is both an AMX tile and the operand order of vdpbf16ps. The number of panels is even, k % 32 == 0. */
typedef struct {
    const bf16 *data;
    const bf16 *bias; /* [n] or NULL */
    int64_t n, k;
} Weight;

INLINE int64_t weight_panels(int64_t n) { return (n + 2 * PANEL - 1) / (2 * PANEL) * 2; }

typedef enum {
    STORE_BF16 = 0, /* out = y */
    STORE_F32 = 1,  /* out = y, float32 */
    ADD_BF16 = 2,   /* out += y, in float32, rounded once */
    SILU_MUL = 3    /* out[:, i] = silu(y[:, i]) * y[:, i + n / 2] */
} Epilogue;

/* A's rows are readable up to a multiple of 16 (their content there is irrelevant). */
SIMD void gemm(Team team, const bf16 *a, int64_t lda, int64_t rows, const Weight *w, Epilogue epilogue, void *out,
               int64_t ldo);

/* c[rows, 32] (+)= a[rows, 32 * tiles_k] @ the two packed panels; rows is 16 or 32. */
SIMD void gemm_block(const bf16 *a, int64_t lda, int rows, const bf16 *panel0, const bf16 *panel1, int64_t tiles_k,
                     float *c, int64_t ldc, int accumulate);

/* ---- rows: rows.c ---- */

SIMD void rms_norm_row(const bf16 *x, const bf16 *weight, float eps, int64_t n, bf16 *out);

typedef struct {
    const float *cos, *sin; /* [T, rotary_dim] */
    int64_t rotary_dim;
    const int64_t *slots;
    const bf16 *q_norm, *k_norm; /* [D] or NULL */
    float eps;
    bf16 *k_cache, *v_cache;
    int64_t k_block_stride, v_block_stride; /* elements between blocks */
    int64_t block_size, num_heads, num_kv_heads, head_dim;
} RopeWrite;

SIMD void rope_write_row(const RopeWrite *r, int64_t token, const bf16 *qkv, bf16 *q);

/* ---- attention: attention.c ---- */

typedef struct {
    const bf16 *q;
    int64_t ldq; /* elements between tokens; heads are contiguous */
    const bf16 *k_cache, *v_cache;
    int64_t k_block_stride, v_block_stride;
    const int32_t *block_tables;
    int64_t table_stride;
    const int32_t *query_starts, *context_lens;
    int64_t num_sequences, num_heads, num_kv_heads, head_dim, block_size;
    float scale, softcap;   /* softcap 0: none */
    int64_t sliding_window; /* 0: none */
    const float *sinks;     /* [H] or NULL */
    bf16 *out;
    int64_t ldo;
} Attention;

typedef struct {
    int32_t sequence, kv_head, first_query, num_queries;
} AttentionItem;

/* Counts the units of work of a step, and lists them if items is not NULL. */
int64_t attention_items(const Attention *a, AttentionItem *items);
/* Per thread. */
int64_t attention_scratch_bytes(void);
/* The members share items through *next_item, 0 before the first arrives; scratch is the member's own. */
SIMD void attention(Team team, const Attention *a, const AttentionItem *items, int64_t num_items, int64_t *next_item,
                    void *scratch);

#endif
