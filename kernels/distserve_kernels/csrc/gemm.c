/* Matrix products with packed bfloat16 weights.
 *
 * Few rows (decode) are bound by reading the weights once: a thread walks two contiguous streams, panel i and panel
 * i + panels / 2, and asks for both ahead of use. Many rows (prefill) are bound by the multipliers: blocks of 32 x 32
 * run over rows that stay in the second-level cache, while the next two panels are fetched.
 */
#include "common.h"

#include <string.h>

/* Bytes ahead of use: enough for a DRAM access, few enough to be there still. */
enum { PREFETCH_BYTES = 2048 };
/* Blocks of so many rows compute long enough for each line that they ask for lines further ahead, and into the
 * second-level cache: there is room for more of them on their way. */
enum { FAR_ROWS = 5, FAR_PREFETCH_BYTES = 8192 };
/* Rows whose inputs stay in the second-level cache while the weights pass by. */
enum { CACHED_INPUT_BYTES = 1 << 20 };

/* ---- blocks of rows x 32 outputs ---- */

SIMD_AMX static void block_amx_32(const bf16 *a, int64_t lda, const bf16 *b0, const bf16 *b1, int64_t tiles_k, float *c,
                                  int64_t ldc, int accumulate, const char *ahead, const char *ahead2,
                                  int64_t ahead_step) {
    const bf16 *a1 = a + TILE * lda;
    if (accumulate) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + PANEL, ldc * 4);
        _tile_loadd(2, c + TILE * ldc, ldc * 4);
        _tile_loadd(3, c + TILE * ldc + PANEL, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t t = 0; t < tiles_k; t++) {
        _tile_loadd(4, a + t * TILE_K, lda * 2);
        _tile_loadd(6, b0 + t * 512, 64);
        for (int64_t i = 0; i < ahead_step; i += 64) {
            _mm_prefetch(ahead + t * ahead_step + i, _MM_HINT_T1);
            _mm_prefetch(ahead2 + t * ahead_step + i, _MM_HINT_T1);
        }
        _tile_loadd(7, b1 + t * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a1 + t * TILE_K, lda * 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + PANEL, ldc * 4);
    _tile_stored(2, c + TILE * ldc, ldc * 4);
    _tile_stored(3, c + TILE * ldc + PANEL, ldc * 4);
}

SIMD_AMX static void block_amx_16(const bf16 *a, int64_t lda, const bf16 *b0, const bf16 *b1, int64_t tiles_k, float *c,
                                  int64_t ldc, int accumulate, int stream) {
    if (accumulate) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + PANEL, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t t = 0; t < tiles_k; t++) {
        if (stream)
            for (int i = 0; i < 1024; i += 64) {
                _mm_prefetch((const char *)(b0 + t * 512) + PREFETCH_BYTES + i, _MM_HINT_T0);
                _mm_prefetch((const char *)(b1 + t * 512) + PREFETCH_BYTES + i, _MM_HINT_T0);
            }
        _tile_loadd(4, a + t * TILE_K, lda * 2);
        _tile_loadd(6, b0 + t * 512, 64);
        _tile_loadd(7, b1 + t * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + PANEL, ldc * 4);
}

SIMD_AMX static void block_amx_32_stream(const bf16 *a, int64_t lda, const bf16 *b0, const bf16 *b1, int64_t tiles_k,
                                         float *c, int64_t ldc) {
    const bf16 *a1 = a + TILE * lda;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < tiles_k; t++) {
        for (int i = 0; i < 1024; i += 64) {
            _mm_prefetch((const char *)(b0 + t * 512) + PREFETCH_BYTES + i, _MM_HINT_T0);
            _mm_prefetch((const char *)(b1 + t * 512) + PREFETCH_BYTES + i, _MM_HINT_T0);
        }
        _tile_loadd(4, a + t * TILE_K, lda * 2);
        _tile_loadd(6, b0 + t * 512, 64);
        _tile_loadd(7, b1 + t * 512, 64);
        _tile_loadd(5, a1 + t * TILE_K, lda * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + PANEL, ldc * 4);
    _tile_stored(2, c + TILE * ldc, ldc * 4);
    _tile_stored(3, c + TILE * ldc + PANEL, ldc * 4);
}

/* One pair of inputs of row r, broadcast. */
#define PAIR(a, lda, r, p) (__m512bh) _mm512_set1_epi32(((const int32_t *)((a) + (r) * (lda)))[p])

/* `rows` is a constant where this is inlined, so the accumulators are registers. */
INLINE SIMD void block_avx512(const bf16 *a, int64_t lda, const int rows, const bf16 *b0, const bf16 *b1,
                              int64_t tiles_k, float *c, int64_t ldc, int accumulate, const int stream) {
    __m512 sum0[12], sum1[12];
    for (int r = 0; r < rows; r++) {
        sum0[r] = accumulate ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
        sum1[r] = accumulate ? _mm512_loadu_ps(c + r * ldc + PANEL) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < tiles_k * 16; p++) {
        const char *line0 = (const char *)b0 + p * 64, *line1 = (const char *)b1 + p * 64;
        if (stream && rows < FAR_ROWS) {
            _mm_prefetch(line0 + PREFETCH_BYTES, _MM_HINT_T0);
            _mm_prefetch(line1 + PREFETCH_BYTES, _MM_HINT_T0);
        } else if (stream) {
            _mm_prefetch(line0 + FAR_PREFETCH_BYTES, _MM_HINT_T1);
            _mm_prefetch(line1 + FAR_PREFETCH_BYTES, _MM_HINT_T1);
        }
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(line0), w1 = (__m512bh)_mm512_loadu_si512(line1);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512bh x = PAIR(a, lda, r, p);
            sum0[r] = _mm512_dpbf16_ps(sum0[r], x, w0);
            sum1[r] = _mm512_dpbf16_ps(sum1[r], x, w1);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(c + r * ldc, sum0[r]);
        _mm512_storeu_ps(c + r * ldc + PANEL, sum1[r]);
    }
}

#define BLOCK_AVX512(rows)                                                                                             \
    SIMD static void block_avx512_##rows(const bf16 *a, int64_t lda, const bf16 *b0, const bf16 *b1, int64_t tiles_k,  \
                                         float *c, int64_t ldc, int accumulate, int stream) {                          \
        if (stream)                                                                                                    \
            block_avx512(a, lda, rows, b0, b1, tiles_k, c, ldc, accumulate, 1);                                        \
        else                                                                                                           \
            block_avx512(a, lda, rows, b0, b1, tiles_k, c, ldc, accumulate, 0);                                        \
    }
BLOCK_AVX512(1)
BLOCK_AVX512(2)
BLOCK_AVX512(3)
BLOCK_AVX512(4)
BLOCK_AVX512(5)
BLOCK_AVX512(6)
BLOCK_AVX512(7)
BLOCK_AVX512(8)
BLOCK_AVX512(9)
BLOCK_AVX512(10)
BLOCK_AVX512(11)
BLOCK_AVX512(12)

enum { BLOCK_ROWS = 12 };

/* A remainder is one block of its very size: every further one would wait for the weights once more. */
SIMD static void blocks_avx512(const bf16 *a, int64_t lda, int rows, const bf16 *b0, const bf16 *b1, int64_t tiles_k,
                               float *c, int64_t ldc, int accumulate, int stream) {
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        block_avx512_##rows(a, lda, b0, b1, tiles_k, c, ldc, accumulate, stream);                                      \
        break;
    while (rows > 0) {
        int step = rows < BLOCK_ROWS ? rows : BLOCK_ROWS;
        switch (step) {
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
            CASE(5)
            CASE(6)
            CASE(7)
            CASE(8)
            CASE(9)
            CASE(10)
            CASE(11)
            CASE(12)
        }
        rows -= step;
        a += step * lda;
        c += step * ldc;
        stream = 0;
    }
#undef CASE
}

SIMD void gemm_block(const bf16 *a, int64_t lda, int rows, const bf16 *panel0, const bf16 *panel1, int64_t tiles_k,
                     float *c, int64_t ldc, int accumulate) {
    if (ds_level < LEVEL_AMX)
        blocks_avx512(a, lda, rows, panel0, panel1, tiles_k, c, ldc, accumulate, 0);
    else if (rows == 2 * TILE)
        block_amx_32(a, lda, panel0, panel1, tiles_k, c, ldc, accumulate, NULL, NULL, 0);
    else
        block_amx_16(a, lda, panel0, panel1, tiles_k, c, ldc, accumulate, 0);
}

/* ---- what becomes of a block ---- */

INLINE SIMD void finish_half(Epilogue epilogue, const float *c, int rows, const Weight *w, int64_t column, char *out,
                             int64_t ldo) {
    int64_t left = w->n - column;
    if (left <= 0) return;
    __mmask16 mask = left >= PANEL ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512 bias = w->bias ? load_bf16_masked(w->bias + column, mask) : _mm512_setzero_ps();
    for (int r = 0; r < rows; r++) {
        __m512 y = _mm512_add_ps(_mm512_loadu_ps(c + r * 2 * PANEL), bias);
        if (epilogue == STORE_F32) {
            _mm512_mask_storeu_ps((float *)out + r * ldo + column, mask, y);
            continue;
        }
        bf16 *p = (bf16 *)out + r * ldo + column;
        if (epilogue == ADD_BF16) y = _mm512_add_ps(y, load_bf16_masked(p, mask));
        store_bf16_masked(p, y, mask);
    }
}

SIMD static void finish(Epilogue epilogue, const float *c, int rows, const Weight *w, int64_t panel, void *out,
                        int64_t ldo) {
    int64_t half = weight_panels(w->n) / 2;
    if (epilogue == SILU_MUL) {
        bf16 *p = (bf16 *)out + panel * PANEL;
        for (int r = 0; r < rows; r++) {
            __m512 gate = _mm512_loadu_ps(c + r * 2 * PANEL), up = _mm512_loadu_ps(c + r * 2 * PANEL + PANEL);
            store_bf16(p + r * ldo, _mm512_mul_ps(silu_ps(gate), up));
        }
        return;
    }
    finish_half(epilogue, c, rows, w, panel * PANEL, out, ldo);
    finish_half(epilogue, c + PANEL, rows, w, (panel + half) * PANEL, out, ldo);
}

/* ---- the whole product ---- */

SIMD static void gemm_few_rows(Team team, const bf16 *a, int64_t lda, int rows, const Weight *w, Epilogue epilogue,
                               void *out, int64_t ldo) {
    float c[2 * TILE * 2 * PANEL] __attribute__((aligned(64)));
    int64_t pairs = weight_panels(w->n) / 2, panel_size = w->k * PANEL, begin, end;
    team_split(team, pairs, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const bf16 *b0 = w->data + i * panel_size, *b1 = w->data + (i + pairs) * panel_size;
        if (ds_level < LEVEL_AMX || rows <= 2)
            blocks_avx512(a, lda, rows, b0, b1, w->k / TILE_K, c, 2 * PANEL, 0, 1);
        else if (rows <= TILE)
            block_amx_16(a, lda, b0, b1, w->k / TILE_K, c, 2 * PANEL, 0, 1);
        else
            block_amx_32_stream(a, lda, b0, b1, w->k / TILE_K, c, 2 * PANEL);
        finish(epilogue, c, rows, w, i, out, ldo);
    }
}

SIMD void gemm(Team team, const bf16 *a, int64_t lda, int64_t rows, const Weight *w, Epilogue epilogue, void *out,
               int64_t ldo) {
    if (rows <= 2 * TILE) {
        gemm_few_rows(team, a, lda, (int)rows, w, epilogue, out, ldo);
        return;
    }
    float c[2 * TILE * 2 * PANEL] __attribute__((aligned(64)));
    int64_t tiles_k = w->k / TILE_K, pairs = weight_panels(w->n) / 2, panel_size = w->k * PANEL, begin, end;
    int64_t chunk = CACHED_INPUT_BYTES / (w->k * 2) / (2 * TILE) * (2 * TILE);
    if (chunk < 2 * TILE) chunk = 2 * TILE;
    size_t out_size = epilogue == STORE_F32 ? 4 : 2;
    team_split(team, pairs, &begin, &end);
    for (int64_t top = 0; top < rows; top += chunk) {
        int64_t bottom = top + chunk < rows ? top + chunk : rows;
        int64_t blocks = (bottom - top + 2 * TILE - 1) / (2 * TILE);
        /* The bytes of each of the next two panels that one tile step of one block fetches, whole lines. */
        int64_t share = (1024 / blocks + 63) / 64 * 64;
        for (int64_t i = begin; i < end; i++) {
            const bf16 *b0 = w->data + i * panel_size, *b1 = w->data + (i + pairs) * panel_size;
            const char *ahead = (const char *)(b0 + panel_size), *ahead2 = (const char *)(b1 + panel_size);
            for (int64_t row = top; row < bottom; row += 2 * TILE) {
                int count = bottom - row < 2 * TILE ? (int)(bottom - row) : 2 * TILE;
                const bf16 *x = a + row * lda;
                int64_t fetched = (row - top) / (2 * TILE) * tiles_k * share;
                if (ds_level < LEVEL_AMX)
                    blocks_avx512(x, lda, count, b0, b1, tiles_k, c, 2 * PANEL, 0, 0);
                else if (count > TILE)
                    block_amx_32(x, lda, b0, b1, tiles_k, c, 2 * PANEL, 0, ahead + fetched, ahead2 + fetched, share);
                else
                    block_amx_16(x, lda, b0, b1, tiles_k, c, 2 * PANEL, 0, 0);
                finish(epilogue, c, count, w, i, (char *)out + (size_t)(row * ldo) * out_size, ldo);
            }
        }
    }
}

/* ---- packing ---- */

/* Packs weight [n, k] (rows ld apart) into `packed`, weight_panels(n) * 16 * k elements. */
EXPORT void ds_pack_weight(const bf16 *weight, int64_t ld, int64_t n, int64_t k, bf16 *packed) {
    for (int64_t panel = 0; panel < weight_panels(n); panel++)
        for (int64_t column = 0; column < PANEL; column++) {
            const int32_t *row = (const int32_t *)(weight + (panel * PANEL + column) * ld);
            int32_t *to = (int32_t *)(packed + panel * PANEL * k) + column;
            if (panel * PANEL + column < n)
                for (int64_t pair = 0; pair < k / 2; pair++) memcpy(to + pair * PANEL, row + pair, 4);
            else
                for (int64_t pair = 0; pair < k / 2; pair++) to[pair * PANEL] = 0;
        }
}

typedef struct {
    const bf16 *x;
    int64_t ldx, rows;
    Weight weight;
    void *out;
    int64_t ldo;
    int32_t out_f32;
} LinearCall;

static void linear_body(void *argument, Team team) {
    const LinearCall *call = argument;
    gemm(team, call->x, call->ldx, call->rows, &call->weight, call->out_f32 ? STORE_F32 : STORE_BF16, call->out,
         call->ldo);
}

/* out [rows, n] = x [rows, k] @ weight.T + bias; x is readable up to a multiple of 16 rows. */
EXPORT void ds_linear(const bf16 *x, int64_t ldx, int64_t rows, const bf16 *packed, const bf16 *bias, int64_t n,
                      int64_t k, void *out, int64_t ldo, int out_f32, int num_threads) {
    LinearCall call = {x, ldx, rows, {packed, bias, n, k}, out, ldo, out_f32};
    team_run(num_threads, linear_body, &call);
}
