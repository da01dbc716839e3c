/* Copies many pieces in one call, so that Python's interpreter lock is taken once per batch and not once per piece.
 *
 * Plain C without Python's headers: loaded with ctypes, which releases the lock while it runs. What arrives is read by
 * another thread, later, and is mostly larger than a core's cache. So stores go around the cache, which saves reading
 * the destination and leaves the cache to the engine, and several pages are under way at once, as in glibc's memcpy of
 * very large blocks.
 */
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

enum { LINE = 64, PAGE = 4096, PAGES = 4, AHEAD = 512 };

static inline void copy_line(char *dst, const char *src) {
    __m128i a = _mm_loadu_si128((const __m128i *)src), b = _mm_loadu_si128((const __m128i *)(src + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(src + 32)), d = _mm_loadu_si128((const __m128i *)(src + 48));
    _mm_stream_si128((__m128i *)dst, a);
    _mm_stream_si128((__m128i *)(dst + 16), b);
    _mm_stream_si128((__m128i *)(dst + 32), c);
    _mm_stream_si128((__m128i *)(dst + 48), d);
}

/* next: what will be copied afterwards. Fetching ahead never faults, so it may run past the end. */
static void copy_piece(char *dst, const char *src, int64_t num_bytes, const char *next) {
    int64_t head = -(uintptr_t)dst & (LINE - 1);
    if (head > num_bytes) head = num_bytes;
    memcpy(dst, src, head);
    dst += head, src += head, num_bytes -= head;
    for (; num_bytes >= PAGES * PAGE; dst += PAGES * PAGE, src += PAGES * PAGE, num_bytes -= PAGES * PAGE)
        for (int64_t line = 0; line < PAGE; line += LINE)
            for (int64_t at = line; at < PAGES * PAGE; at += PAGE) {
                _mm_prefetch(src + at + AHEAD, _MM_HINT_T0);
                copy_line(dst + at, src + at);
            }
    for (; num_bytes >= LINE; dst += LINE, src += LINE, next += LINE, num_bytes -= LINE) {
        _mm_prefetch(next, _MM_HINT_T0);
        copy_line(dst, src);
    }
    memcpy(dst, src, num_bytes);
}

/* Stores around the cache are not ordered with others by themselves. */
static void finish(void) { _mm_sfence(); }
#else
static void copy_piece(char *dst, const char *src, int64_t num_bytes, const char *next) {
    (void)next;
    memcpy(dst, src, num_bytes);
}

static void finish(void) {}
#endif

/* pieces: num_pieces (at least one) rows of (offset in src, offset in dst, bytes), copied num_planes times, each time
 * src_stride and dst_stride further on. No piece overlaps another's destination. */
__attribute__((visibility("default"))) void distserve_copy_pieces(const char *src, char *dst, const int64_t *pieces,
                                                                  int64_t num_pieces, int64_t num_planes,
                                                                  int64_t src_stride, int64_t dst_stride) {
    const int64_t *last = pieces + 3 * (num_pieces - 1);
    /* Pairs with the source's order of KV before progress; no instruction on x86-64. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int64_t plane = 0; plane < num_planes; plane++, src += src_stride, dst += dst_stride)
        for (const int64_t *piece = pieces; piece <= last; piece += 3)
            copy_piece(dst + piece[1], src + piece[0], piece[2],
                       piece < last ? src + piece[3] : src + src_stride + pieces[0]);
    finish();
}
