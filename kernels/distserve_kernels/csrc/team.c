/* Threads and processor features.
 *
 * Parallel regions run on the OpenMP pool that torch already has: its entry points are handed in by address, so the
 * process has one pool of the size torch was told, and this library depends on no OpenMP runtime of its own.
 */
#include "common.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static void (*gomp_barrier)(void);
static int (*thread_num)(void);
static int (*num_threads_running)(void);

int ds_level = LEVEL_NONE;

/* Intel's Software Developer's Manual, volume 2, CPUID, and volume 1, 13.3 (state enabled by the system). */
static int detect_level(void) {
    unsigned a, b, c, d, state_low, state_high;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) /* OSXSAVE */
        return LEVEL_NONE;
    __asm__("xgetbv" : "=a"(state_low), "=d"(state_high) : "c"(0));
    if ((state_low & 0xe6) != 0xe6) return LEVEL_NONE; /* SSE, AVX and the three parts of AVX-512 */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) /* AVX512_BF16 */
        return LEVEL_NONE;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if ((b & avx512) != avx512) return LEVEL_NONE;
    if (!(d & (1u << 22)) || !(d & (1u << 24))) /* AMX-BF16, AMX-TILE */
        return LEVEL_AVX512;
    /* Linux grants tile state per process on request: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? LEVEL_AMX : LEVEL_AVX512;
}

/* Detects the processor, at most `highest`; called once before anything else. */
EXPORT int ds_initialize(int highest, void *parallel, void *barrier, void *get_thread_num, void *get_num_threads) {
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    gomp_barrier = (void (*)(void))barrier;
    thread_num = (int (*)(void))get_thread_num;
    num_threads_running = (int (*)(void))get_num_threads;
    ds_level = detect_level();
    if (ds_level > highest) ds_level = highest;
    return ds_level;
}

typedef struct {
    TeamBody body;
    void *argument;
} Region;

SIMD_AMX static void configure(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes_per_row[i] = 64;
        config.rows[i] = TILE;
    }
    /* Some compilers take the instruction to read only the first bytes of its operand. */
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

SIMD_AMX static void release(void) { _tile_release(); }

void tiles_configure(void) {
    if (ds_level >= LEVEL_AMX) configure();
}

void tiles_release(void) {
    if (ds_level >= LEVEL_AMX) release();
}

static void run_member(void *pointer) {
    const Region *region = pointer;
    tiles_configure();
    region->body(region->argument, (Team){thread_num(), num_threads_running()});
    tiles_release();
}

void team_run(int num_threads, TeamBody body, void *argument) {
    if (num_threads <= 1 || !gomp_parallel) {
        tiles_configure();
        body(argument, (Team){0, 1});
        tiles_release();
        return;
    }
    Region region = {body, argument};
    gomp_parallel(run_member, &region, (unsigned)num_threads, 0);
}

void team_barrier(Team team) {
    if (team.size > 1) gomp_barrier();
}
