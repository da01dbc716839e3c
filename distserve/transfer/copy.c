/* Copies many pieces in one call, so that Python's interpreter lock is taken once per batch and not once per piece.
 *
 * Plain C without Python's headers: loaded with ctypes, which releases the lock while it runs. Scattered pieces are
 * what it is for: memcpy knows nothing of the next one, whose first accesses miss every cache and the address
 * translation, so each piece is fetched while the one before is copied.
 */
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { LINE = 64, PAGE = 4096, PAGES = 4, AHEAD = 512, LONG = 16384 };

/* A piece and where the next one lies. Fetching ahead never faults, so it may run past the end. */
typedef struct {
    char *dst;
    const char *src;
    int64_t num_bytes;
    char *next_dst;
    const char *next_src;
} Piece;

/* For a destination that a processor's caches hold. */
static void copy_cached(Piece p) {
    if (p.num_bytes >= LONG) {
        memcpy(p.dst, p.src, p.num_bytes);
        return;
    }
    int64_t at = 0;
    for (; at + LINE <= p.num_bytes; at += LINE) {
        __builtin_prefetch(p.next_src + at);
        __builtin_prefetch(p.next_dst + at, 1);
        memcpy(p.dst + at, p.src + at, LINE);
    }
    memcpy(p.dst + at, p.src + at, p.num_bytes - at);
}

#ifdef __SSE2__
static inline void stream_line(char *dst, const char *src) {
    __m128i a = _mm_loadu_si128((const __m128i *)src), b = _mm_loadu_si128((const __m128i *)(src + 16));
    __m128i c = _mm_loadu_si128((const __m128i *)(src + 32)), d = _mm_loadu_si128((const __m128i *)(src + 48));
    _mm_stream_si128((__m128i *)dst, a);
    _mm_stream_si128((__m128i *)(dst + 16), b);
    _mm_stream_si128((__m128i *)(dst + 32), c);
    _mm_stream_si128((__m128i *)(dst + 48), d);
}

/* For a larger one. Stores go around the caches, which saves reading the destination and leaves the caches to the
 * engine; several pages are under way at once, as in glibc's memcpy of very large blocks. */
static void copy_streaming(Piece p) {
    int64_t head = -(uintptr_t)p.dst & (LINE - 1);
    if (head > p.num_bytes) head = p.num_bytes;
    memcpy(p.dst, p.src, head);
    char *dst = p.dst + head;
    const char *src = p.src + head;
    int64_t num_bytes = p.num_bytes - head;
    for (; num_bytes >= PAGES * PAGE; dst += PAGES * PAGE, src += PAGES * PAGE, num_bytes -= PAGES * PAGE)
        for (int64_t line = 0; line < PAGE; line += LINE)
            for (int64_t at = line; at < PAGES * PAGE; at += PAGE) {
                _mm_prefetch(src + at + AHEAD, _MM_HINT_T0);
                stream_line(dst + at, src + at);
            }
    for (; num_bytes >= LINE; dst += LINE, src += LINE, p.next_src += LINE, num_bytes -= LINE) {
        _mm_prefetch(p.next_src, _MM_HINT_T0);
        stream_line(dst, src);
    }
    memcpy(dst, src, num_bytes);
}

/* Stores around the caches are not ordered with others by themselves. */
static void finish_streaming(void) { _mm_sfence(); }
#else
static void copy_streaming(Piece p) { copy_cached(p); }

static void finish_streaming(void) {}
#endif

/* pieces: num_pieces (at least one) rows of (offset in src, offset in dst, bytes), copied num_planes times, each time
 * src_stride and dst_stride further on. No piece overlaps another's destination. */
__attribute__((visibility("default"))) void distserve_copy_pieces(const char *src, char *dst, const int64_t *pieces,
                                                                  int64_t num_pieces, int64_t num_planes,
                                                                  int64_t src_stride, int64_t dst_stride,
                                                                  int32_t streaming) {
    const int64_t *last = pieces + 3 * (num_pieces - 1);
    /* Pairs with the source's order of KV before progress; no instruction on x86-64. */
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int64_t plane = 0; plane < num_planes; plane++, src += src_stride, dst += dst_stride)
        for (const int64_t *piece = pieces; piece <= last; piece += 3) {
            Piece p = {dst + piece[1], src + piece[0], piece[2], dst + dst_stride + pieces[1],
                       src + src_stride + pieces[0]};
            if (piece < last) p.next_dst = dst + piece[4], p.next_src = src + piece[3];
            if (streaming)
                copy_streaming(p);
            else
                copy_cached(p);
        }
    if (streaming) finish_streaming();
}
