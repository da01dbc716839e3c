/* Paged attention.
 *
 * A unit of work is one sequence (or a piece of its queries) and one KV head with the query heads that share it. Its
 * rows are (query, head) pairs, the head varying fastest, so what a row may see never shrinks from row to row.
 *
 * Few rows (decode) read the cache once, in place: scores of 16 keys x rows, softmax in a compact [key][row] layout,
 * then values weighted in registers. Many rows (prefill) pack a block of keys and values for the matrix kernels and
 * pass all rows over it. Both keep a running maximum and sum (online softmax, Milakov and Gimelshein, 2018).
 *
 * Slots outside a sequence's context are never used, whatever they hold: their scores are masked and their values
 * replaced by zeros.
 */
#include "common.h"

#include <string.h>

enum {
    MAX_HEAD_DIM = 256,
    FEW_ROWS = 16,       /* at most these rows take the decode path */
    KEYS = 128,          /* keys per pass of either path */
    MANY_ROWS = 768      /* rows per unit of work of the prefill path */
};

#define NO_SCORE -1e30f /* the maximum of nothing: finite, so that differences are never NaN */

static const bf16 zeros[MAX_HEAD_DIM] __attribute__((aligned(64)));

/* ---- units of work ---- */

int64_t attention_items(const Attention *a, AttentionItem *items) {
    int64_t group = a->num_heads / a->num_kv_heads, count = 0;
    int32_t piece = (int32_t)(MANY_ROWS / group > 0 ? MANY_ROWS / group : 1);
    for (int32_t b = 0; b < a->num_sequences; b++) {
        int32_t queries = a->query_starts[b + 1] - a->query_starts[b];
        /* The last pieces see the most keys: they go first, so that threads finish together. */
        for (int32_t first = (queries - 1) / piece * piece; queries > 0 && first >= 0; first -= piece)
            for (int32_t h = 0; h < a->num_kv_heads; h++, count++)
                if (items)
                    items[count] = (AttentionItem){b, h, first, queries - first < piece ? queries - first : piece};
    }
    return count;
}

typedef struct {
    int64_t rows, rows_padded; /* padded to the compact layout (few) or to whole blocks (many) */
    int64_t group, head_dim;
    int64_t context;     /* keys the last row sees, from 0 */
    int64_t first_query; /* position of the first row's query */
    int64_t begin;       /* first key any row sees */
} Work;

static Work make_work(const Attention *a, const AttentionItem *item) {
    Work w;
    w.group = a->num_heads / a->num_kv_heads;
    w.head_dim = a->head_dim;
    w.rows = item->num_queries * w.group;
    int64_t queries = a->query_starts[item->sequence + 1] - a->query_starts[item->sequence];
    w.first_query = a->context_lens[item->sequence] - queries + item->first_query;
    w.context = w.first_query + item->num_queries;
    w.begin = a->sliding_window ? w.first_query - a->sliding_window + 1 : 0;
    if (w.begin < 0) w.begin = 0;
    return w;
}

INLINE const bf16 *key_row(const Attention *a, const AttentionItem *item, const bf16 *cache, int64_t block_stride,
                           int64_t position) {
    int64_t block = a->block_tables[item->sequence * a->table_stride + position / a->block_size];
    return cache + block * block_stride +
           (position % a->block_size * a->num_kv_heads + item->kv_head) * a->head_dim;
}

INLINE const bf16 *query_row(const Attention *a, const AttentionItem *item, const Work *w, int64_t row) {
    int64_t token = a->query_starts[item->sequence] + item->first_query + row / w->group;
    return a->q + token * a->ldq + (item->kv_head * w->group + row % w->group) * a->head_dim;
}

INLINE bf16 *out_row(const Attention *a, const AttentionItem *item, const Work *w, int64_t row) {
    int64_t token = a->query_starts[item->sequence] + item->first_query + row / w->group;
    return a->out + token * a->ldo + (item->kv_head * w->group + row % w->group) * a->head_dim;
}

/* Scores leave this in units of log2, so that exp2 follows. */
INLINE SIMD __m512 scaled(const Attention *a, __m512 score) {
    if (a->softcap == 0.0f) return _mm512_mul_ps(score, _mm512_set1_ps(a->scale * LOG2E));
    /* tanh(x) = 1 - 2 / (exp(2 x) + 1) */
    __m512 e = exp2_ps(_mm512_min_ps(_mm512_mul_ps(score, _mm512_set1_ps(2 * LOG2E * a->scale / a->softcap)),
                                     _mm512_set1_ps(126.0f)));
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(a->softcap * LOG2E));
}

INLINE SIMD float exp2_scalar(float x) { return _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(x))); }

/* Turns a row's weighted sum into its output. */
SIMD static void finish_row(const Attention *a, const AttentionItem *item, const Work *w, int64_t row, const float *sum,
                            float maximum, float weights) {
    if (a->sinks) weights += exp2_scalar(a->sinks[item->kv_head * w->group + row % w->group] * LOG2E - maximum);
    __m512 factor = _mm512_set1_ps(1.0f / weights);
    bf16 *out = out_row(a, item, w, row);
    for (int64_t d = 0; d < w->head_dim; d += 16)
        store_bf16(out + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), factor));
}

/* ---- few rows ---- */

typedef struct {
    bf16 queries[FEW_ROWS * MAX_HEAD_DIM];      /* row-major, or AMX operand: [32 dims][16 pairs][16 rows][2] */
    float scores[(KEYS + TILE) * FEW_ROWS];     /* [key][row]; a tile store may run past the end */
    int32_t weights[KEYS / 2 * FEW_ROWS];       /* [key pair][row] as two bf16 */
    float sums[FEW_ROWS * MAX_HEAD_DIM];        /* [row][dim], dims in the order of the unpack instructions */
    const bf16 *keys[KEYS / TILE], *values[KEYS];
} FewScratch;

SIMD_AMX static void score_tile_amx(const bf16 *queries, const bf16 *keys, int64_t key_stride, int64_t head_dim,
                                    float *scores, int64_t rows_padded) {
    _tile_zero(0);
    for (int64_t d = 0; d < head_dim / TILE_K; d++) {
        _tile_loadd(4, keys + d * TILE_K, key_stride * 2);
        _tile_loadd(6, queries + d * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    /* Rows are stored in order, so each overwrites the unused columns of the one before: a compact layout. */
    _tile_stored(0, scores, rows_padded * 4);
}

/* Lane i of the result is the sum of v[i]'s lanes. */
INLINE SIMD __m512 sums_of_16(__m512 v[16]) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    __m512 d = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
    return _mm512_shuffle_f32x4(d, d, 0xd8); /* its 128-bit lanes are of v[0..], v[8..], v[4..], v[12..] */
}

/* `rows_padded` is a constant where this is inlined: dividing by it took longer than all else. */
INLINE SIMD void score_rows_avx512(const bf16 *queries, const bf16 *keys, int64_t key_stride, int64_t head_dim,
                                   float *scores, const int rows_padded) {
    for (int first = 0; first < TILE * rows_padded; first += 16) {
        __m512 sums[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const bf16 *key = keys + (first / rows_padded + i / rows_padded) * key_stride;
            const bf16 *query = queries + i % rows_padded * head_dim;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < head_dim; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(key + d),
                                       (__m512bh)_mm512_loadu_si512(query + d));
            sums[i] = sum;
        }
        _mm512_storeu_ps(scores + first, sums_of_16(sums));
    }
}

SIMD static void score_tile_avx512(const bf16 *queries, const bf16 *keys, int64_t key_stride, int64_t head_dim,
                                   float *scores, int64_t rows_padded) {
    if (rows_padded == 4)
        score_rows_avx512(queries, keys, key_stride, head_dim, scores, 4);
    else if (rows_padded == 8)
        score_rows_avx512(queries, keys, key_stride, head_dim, scores, 8);
    else
        score_rows_avx512(queries, keys, key_stride, head_dim, scores, 16);
}

SIMD static void pack_few_queries(const Attention *a, const AttentionItem *item, const Work *w, int64_t rows_padded,
                                  bf16 *to) {
    int64_t dims = w->head_dim;
    if (ds_level < LEVEL_AMX) {
        for (int64_t row = 0; row < rows_padded; row++)
            memcpy(to + row * dims, row < w->rows ? query_row(a, item, w, row) : zeros, (size_t)dims * 2);
        return;
    }
    memset(to, 0, (size_t)dims * TILE * 2);
    for (int64_t row = 0; row < w->rows; row++) {
        const int32_t *pairs = (const int32_t *)query_row(a, item, w, row);
        for (int64_t p = 0; p < dims / 2; p++) ((int32_t *)to)[p * TILE + row] = pairs[p];
    }
}

/* sums[row] = sums[row] * decay[row] + weights @ values over `units` times 32 dims; rows and units are constants. */
INLINE SIMD void weigh_values(const FewScratch *s, int64_t pairs, int64_t rows_padded, int64_t row, int64_t dim,
                              const int rows, const int units, const float *decay, float *sums, int64_t head_dim) {
    __m512 lo[4][2], hi[4][2];
    for (int r = 0; r < rows; r++) {
        __m512 factor = _mm512_set1_ps(decay[row + r]);
        for (int u = 0; u < units; u++) {
            const float *sum = sums + (row + r) * head_dim + dim + u * 32;
            lo[r][u] = _mm512_mul_ps(_mm512_loadu_ps(sum), factor);
            hi[r][u] = _mm512_mul_ps(_mm512_loadu_ps(sum + 16), factor);
        }
    }
    for (int64_t p = 0; p < pairs; p++) {
        const bf16 *even = s->values[2 * p] + dim, *odd = s->values[2 * p + 1] + dim;
        const int32_t *weights = s->weights + p * rows_padded + row;
        for (int u = 0; u < units; u++) {
            __m512i x = _mm512_loadu_si512(even + u * 32), y = _mm512_loadu_si512(odd + u * 32);
            __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
            for (int r = 0; r < rows; r++) {
                __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[r]);
                lo[r][u] = _mm512_dpbf16_ps(lo[r][u], weight, low);
                hi[r][u] = _mm512_dpbf16_ps(hi[r][u], weight, high);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int u = 0; u < units; u++) {
            float *sum = sums + (row + r) * head_dim + dim + u * 32;
            _mm512_storeu_ps(sum, lo[r][u]);
            _mm512_storeu_ps(sum + 16, hi[r][u]);
        }
}

#define WEIGH(rows, units)                                                                                             \
    weigh_values(s, pairs, rows_padded, row, dim, rows, units, decay, s->sums, w->head_dim);                           \
    break

SIMD static void weigh_all_values(FewScratch *s, const Work *w, int64_t pairs, int64_t rows_padded,
                                  const float *decay) {
    for (int64_t dim = 0; dim < w->head_dim;) {
        int units = w->head_dim - dim >= 64 ? 2 : 1;
        for (int64_t row = 0; row < w->rows; row += 4) {
            int64_t rows = w->rows - row < 4 ? w->rows - row : 4;
            switch (rows * 2 + units - 1) {
                case 2: WEIGH(1, 1);
                case 3: WEIGH(1, 2);
                case 4: WEIGH(2, 1);
                case 5: WEIGH(2, 2);
                case 6: WEIGH(3, 1);
                case 7: WEIGH(3, 2);
                case 8: WEIGH(4, 1);
                case 9: WEIGH(4, 2);
            }
        }
        dim += units * 32;
    }
}

/* Every lane becomes the maximum (sum) of the lanes that are equal to it modulo rows_padded. */
#define FOLD(name, op)                                                                                                 \
    INLINE SIMD __m512 name(__m512 x, int64_t rows_padded) {                                                           \
        if (rows_padded <= 8) x = op(x, _mm512_shuffle_f32x4(x, x, 0x4e));                                             \
        if (rows_padded <= 4) x = op(x, _mm512_shuffle_f32x4(x, x, 0xb1));                                             \
        return x;                                                                                                      \
    }
FOLD(fold_max, _mm512_max_ps)
FOLD(fold_sum, _mm512_add_ps)

/* Two consecutive vectors of [key][row] weights as one of [key pair][row], the even key in the low half. */
INLINE SIMD __m512i weight_pairs(__m512 x, __m512 y, int64_t rows_padded) {
    __m512 even = x, odd = y;
    if (rows_padded == 4) {
        even = _mm512_shuffle_f32x4(x, y, 0x88);
        odd = _mm512_shuffle_f32x4(x, y, 0xdd);
    } else if (rows_padded == 8) {
        even = _mm512_shuffle_f32x4(x, y, 0x44);
        odd = _mm512_shuffle_f32x4(x, y, 0xee);
    }
    return _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(even)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(odd)), 16));
}

/* Fetches the tile of keys and values at `position` of what this thread reads: the item, then the one after it. */
INLINE void prefetch_tile(const Attention *a, const AttentionItem *item, const Work *w, const AttentionItem *next,
                          const Work *next_work, int64_t position) {
    if (position >= w->context) {
        if (!next) return;
        position += next_work->begin / TILE * TILE - (w->context + TILE - 1) / TILE * TILE;
        if (position >= next_work->context) return;
        item = next;
    }
    const char *k = (const char *)key_row(a, item, a->k_cache, a->k_block_stride, position);
    const char *v = (const char *)key_row(a, item, a->v_cache, a->v_block_stride, position);
    int64_t stride = a->num_kv_heads * a->head_dim * 2;
    for (int i = 0; i < TILE; i++)
        for (int64_t byte = 0; byte < a->head_dim * 2; byte += 64) {
            _mm_prefetch(k + i * stride + byte, _MM_HINT_T1);
            _mm_prefetch(v + i * stride + byte, _MM_HINT_T1);
        }
}

SIMD static void run_few(const Attention *a, const AttentionItem *item, const Work *w, const AttentionItem *next,
                         const Work *next_work, FewScratch *s) {
    int64_t rows_padded = w->rows <= 4 ? 4 : w->rows <= 8 ? 8 : 16, keys_per_vector = 16 / rows_padded;
    int64_t stride = a->num_kv_heads * a->head_dim;
    pack_few_queries(a, item, w, rows_padded, s->queries);
    memset(s->sums, 0, (size_t)(w->rows * w->head_dim) * sizeof(float));
    int32_t last_of[16], key_of[16];
    for (int i = 0; i < 16; i++) {
        int64_t row = i % rows_padded < w->rows ? i % rows_padded : w->rows - 1;
        last_of[i] = (int32_t)(w->first_query + row / w->group);
        key_of[i] = (int32_t)(i / rows_padded);
    }
    __m512i last = _mm512_loadu_si512(last_of), key_offset = _mm512_loadu_si512(key_of);
    __m512i first = a->sliding_window
                        ? _mm512_sub_epi32(last, _mm512_set1_epi32((int32_t)(a->sliding_window - 1)))
                        : _mm512_setzero_si512();
    int64_t all_from = a->sliding_window ? w->context - a->sliding_window : 0; /* first key that every row sees */
    __m512 maximum = _mm512_set1_ps(NO_SCORE), total = _mm512_setzero_ps();
    for (int64_t base = w->begin / TILE * TILE; base < w->context; base += KEYS) {
        int64_t count = w->context - base < KEYS ? w->context - base : KEYS, tiles = (count + TILE - 1) / TILE;
        for (int64_t t = 0; t < tiles; t++) {
            const bf16 *keys = key_row(a, item, a->k_cache, a->k_block_stride, base + t * TILE);
            const bf16 *values = key_row(a, item, a->v_cache, a->v_block_stride, base + t * TILE);
            prefetch_tile(a, item, w, next, next_work, base + t * TILE + KEYS);
            if (ds_level < LEVEL_AMX)
                score_tile_avx512(s->queries, keys, stride, w->head_dim, s->scores + t * TILE * rows_padded,
                                  rows_padded);
            else
                score_tile_amx(s->queries, keys, stride, w->head_dim, s->scores + t * TILE * rows_padded,
                               rows_padded);
            for (int64_t i = 0; i < TILE; i++) {
                int64_t position = base + t * TILE + i;
                s->values[t * TILE + i] = position >= w->begin && position < w->context ? values + i * stride : zeros;
            }
        }
        int64_t vectors = tiles * rows_padded;
        int masked = base < all_from || base < w->begin || base + tiles * TILE > w->first_query + 1;
        __m512 top = maximum;
        for (int64_t v = 0; v < vectors; v++) {
            __m512 x = scaled(a, _mm512_loadu_ps(s->scores + v * 16));
            if (masked) {
                __m512i key = _mm512_add_epi32(key_offset, _mm512_set1_epi32((int32_t)(base + v * keys_per_vector)));
                __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpge_epi32_mask(key, first);
                x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), x);
            }
            _mm512_storeu_ps(s->scores + v * 16, x);
            top = _mm512_max_ps(top, x);
        }
        top = fold_max(top, rows_padded);
        __m512 decay_v = exp2_ps(_mm512_sub_ps(maximum, top));
        float decay[16];
        _mm512_storeu_ps(decay, decay_v);
        maximum = top;
        total = _mm512_mul_ps(total, decay_v);
        for (int64_t v = 0; v < vectors; v += 2) {
            __m512 x = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(s->scores + v * 16), maximum));
            __m512 y = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(s->scores + v * 16 + 16), maximum));
            total = _mm512_add_ps(total, _mm512_add_ps(x, y));
            _mm512_storeu_si512(s->weights + v / 2 * 16, weight_pairs(x, y, rows_padded));
        }
        weigh_all_values(s, w, (count + 1) / 2, rows_padded, decay);
    }
    float maxima[16], totals[16];
    _mm512_storeu_ps(maxima, maximum);
    _mm512_storeu_ps(totals, fold_sum(total, rows_padded));
    for (int64_t row = 0; row < w->rows; row++) {
        float *sum = s->sums + row * w->head_dim;
        for (int64_t d = 0; d < w->head_dim; d += 32) {
            /* Undo the order of the unpack instructions: lane l of the halves holds dims 8 l.. and 8 l + 4.. */
            __m512 low = _mm512_loadu_ps(sum + d), high = _mm512_loadu_ps(sum + d + 16);
            __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
            __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
            _mm512_storeu_ps(sum + d, _mm512_permutex2var_ps(low, front, high));
            _mm512_storeu_ps(sum + d + 16, _mm512_permutex2var_ps(low, back, high));
        }
        finish_row(a, item, w, row, sum, maxima[row], totals[row]);
    }
}

/* ---- many rows ---- */

typedef struct {
    float scores[2 * TILE * KEYS];
    bf16 weights[2 * TILE * KEYS];
    float maxima[MANY_ROWS + 2 * TILE], totals[MANY_ROWS + 2 * TILE];
    bf16 keys[KEYS * MAX_HEAD_DIM];   /* panels of 16 keys over the head's dims */
    bf16 values[KEYS * MAX_HEAD_DIM]; /* panels of 16 dims over KEYS keys */
    bf16 queries[(MANY_ROWS + 2 * TILE) * MAX_HEAD_DIM];
    float sums[(MANY_ROWS + 2 * TILE) * MAX_HEAD_DIM];
} ManyScratch;

/* out[i][j] = in[j][i] for 16 x 16 words, in's rows given by pointers. */
SIMD static void transpose_16(const bf16 *const rows[16], int64_t offset, bf16 *out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + offset);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        __m512i low2 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        __m512i high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_si512(out + i * 32, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(out + (i + 8) * 32, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_storeu_si512(out + (i + 4) * 32, _mm512_shuffle_i32x4(low2, high2, 0x88));
        _mm512_storeu_si512(out + (i + 12) * 32, _mm512_shuffle_i32x4(low2, high2, 0xdd));
    }
}

/* Packs `padded` (a multiple of 32) keys and values from position base on; those no row may see become zeros. */
SIMD static void pack_keys(const Attention *a, const AttentionItem *item, const Work *w, int64_t base, int64_t padded,
                           ManyScratch *s) {
    int64_t tiles = w->head_dim / TILE_K;
    for (int64_t t = 0; t < padded / TILE; t++) {
        const bf16 *keys[TILE], *values[TILE];
        int64_t start = base + t * TILE;
        int any = start < w->context && start + TILE > w->begin;
        const bf16 *k = any ? key_row(a, item, a->k_cache, a->k_block_stride, start) : zeros;
        const bf16 *v = any ? key_row(a, item, a->v_cache, a->v_block_stride, start) : zeros;
        for (int64_t i = 0; i < TILE; i++) {
            int seen = start + i >= w->begin && start + i < w->context;
            keys[i] = seen ? k + i * a->num_kv_heads * a->head_dim : zeros;
            values[i] = seen ? v + i * a->num_kv_heads * a->head_dim : zeros;
        }
        for (int64_t d = 0; d < tiles; d++) transpose_16(keys, d * TILE_K, s->keys + (t * tiles + d) * 512);
        for (int64_t i = 0; i < TILE; i += 2)
            for (int64_t d = 0; d < w->head_dim; d += PANEL) {
                __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i] + d)));
                __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i + 1] + d)));
                bf16 *to = s->values + d / PANEL * (KEYS * PANEL) + (t * TILE + i) * PANEL;
                _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }
}

/* One row's scores become weights; returns the factor that its earlier sums take. Two chains of maxima and sums, for
 * one would wait on itself. */
INLINE SIMD float soften_row(const Attention *a, const float *scores, int64_t keys, int masked, int64_t first_seen,
                             int64_t last_seen, float *maximum, float *total, bf16 *weights) {
    __m512 x[KEYS / 16] = {_mm512_setzero_ps()}, top[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512i key = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    top[0] = top[1] = _mm512_set1_ps(*maximum);
#pragma GCC unroll 8
    for (int v = 0; v < KEYS / 16; v++) {
        if (v * 16 >= keys) break;
        x[v] = scaled(a, _mm512_loadu_ps(scores + v * 16));
        if (masked) {
            __m512i position = _mm512_add_epi32(key, _mm512_set1_epi32(v * 16));
            __mmask16 seen = _mm512_cmple_epi32_mask(position, _mm512_set1_epi32((int32_t)last_seen)) &
                             _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32((int32_t)first_seen));
            x[v] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), x[v]);
        }
        top[v & 1] = _mm512_max_ps(top[v & 1], x[v]);
    }
    float new_maximum = _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1]));
    __m512 highest = _mm512_set1_ps(new_maximum);
#pragma GCC unroll 8
    for (int v = 0; v < KEYS / 16; v++) {
        if (v * 16 >= keys) break;
        __m512 y = exp2_ps(_mm512_sub_ps(x[v], highest));
        sum[v & 1] = _mm512_add_ps(sum[v & 1], y);
        store_bf16(weights + v * 16, y);
    }
    float decay = *maximum == new_maximum ? 1.0f : exp2_scalar(*maximum - new_maximum);
    *total = *total * decay + _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
    *maximum = new_maximum;
    return decay;
}

SIMD static void run_many(const Attention *a, const AttentionItem *item, const Work *w, ManyScratch *s) {
    int64_t dims = w->head_dim, tiles = dims / TILE_K;
    int64_t rows_padded = (w->rows + TILE - 1) / TILE * TILE;
    for (int64_t row = 0; row < rows_padded; row++) {
        memcpy(s->queries + row * dims, row < w->rows ? query_row(a, item, w, row) : zeros, (size_t)dims * 2);
        s->maxima[row] = NO_SCORE;
        s->totals[row] = 0.0f;
    }
    memset(s->sums, 0, (size_t)(rows_padded * dims) * sizeof(float));
    for (int64_t base = w->begin / TILE * TILE; base < w->context; base += KEYS) {
        int64_t count = w->context - base < KEYS ? w->context - base : KEYS;
        pack_keys(a, item, w, base, (count + 31) / 32 * 32, s);
        for (int64_t row = 0; row < w->rows; row += 2 * TILE) {
            int rows = rows_padded - row < 2 * TILE ? TILE : 2 * TILE;
            int64_t bottom = row + rows < w->rows ? row + rows : w->rows;
            /* What the block's first and last rows see, relative to base. */
            int64_t least = w->first_query + row / w->group - base;
            int64_t most = w->first_query + (bottom - 1) / w->group - base;
            if (most < 0) continue;
            if (a->sliding_window && least - a->sliding_window + 1 >= count) continue;
            int64_t keys = most + 1 < count ? most + 1 : count;
            int masked = least + 1 < (keys + 31) / 32 * 32 || (a->sliding_window && most - a->sliding_window + 1 > 0);
            keys = (keys + 31) / 32 * 32;
            for (int64_t k = 0; k < keys; k += 32) {
                const bf16 *panel = s->keys + k / PANEL * tiles * 512;
                gemm_block(s->queries + row * dims, dims, rows, panel, panel + tiles * 512, tiles, s->scores + k,
                           KEYS, 0);
            }
            for (int64_t r = 0; r < rows; r++) {
                int64_t clipped = row + r < w->rows ? row + r : w->rows - 1;
                int64_t last = w->first_query + clipped / w->group - base;
                int64_t first = a->sliding_window ? last - a->sliding_window + 1 : w->begin - base;
                float decay = soften_row(a, s->scores + r * KEYS, keys, masked, first, last, &s->maxima[row + r],
                                         &s->totals[row + r], s->weights + r * KEYS);
                if (decay != 1.0f) {
                    float *sum = s->sums + (row + r) * dims;
                    for (int64_t d = 0; d < dims; d += 16)
                        _mm512_storeu_ps(sum + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), _mm512_set1_ps(decay)));
                }
            }
            for (int64_t d = 0; d < dims; d += 32) {
                const bf16 *panel = s->values + d / PANEL * (KEYS * PANEL);
                gemm_block(s->weights, KEYS, rows, panel, panel + KEYS * PANEL, keys / 32, s->sums + row * dims + d,
                           dims, 1);
            }
        }
    }
    for (int64_t row = 0; row < w->rows; row++)
        finish_row(a, item, w, row, s->sums + row * dims, s->maxima[row], s->totals[row]);
}

/* ---- either ---- */

int64_t attention_scratch_bytes(void) {
    return sizeof(ManyScratch) > sizeof(FewScratch) ? sizeof(ManyScratch) : sizeof(FewScratch);
}

SIMD void attention(Team team, const Attention *a, const AttentionItem *items, int64_t num_items, int64_t *next_item,
                    void *scratch) {
    (void)team;
    int64_t mine = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
    while (mine < num_items) {
        /* Taken one ahead, so that its keys can be fetched meanwhile. */
        int64_t following = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
        Work w = make_work(a, &items[mine]), next = {0};
        if (following < num_items) next = make_work(a, &items[following]);
        if (w.rows > FEW_ROWS)
            run_many(a, &items[mine], &w, scratch);
        else
            run_few(a, &items[mine], &w, next.rows > 0 && next.rows <= FEW_ROWS ? &items[following] : NULL, &next,
                    scratch);
        mine = following;
    }
}

typedef struct {
    const Attention *attention;
    AttentionItem *items;
    int64_t num_items, next_item;
    char *scratch;
} AttentionCall;

static void attention_body(void *argument, Team team) {
    AttentionCall *c = argument;
    attention(team, c->attention, c->items, c->num_items, &c->next_item,
              c->scratch + team.id * attention_scratch_bytes());
}

/* Bytes of scratch a call over these many threads and units of work needs. */
EXPORT int64_t ds_attention_scratch(const Attention *a, int num_threads) {
    return num_threads * attention_scratch_bytes() +
           attention_items(a, NULL) * (int64_t)sizeof(AttentionItem);
}

EXPORT void ds_paged_attention(const Attention *a, char *scratch, int num_threads) {
    AttentionItem *items = (AttentionItem *)(scratch + num_threads * attention_scratch_bytes());
    AttentionCall call = {a, items, attention_items(a, items), 0, scratch};
    team_run(num_threads, attention_body, &call);
}
