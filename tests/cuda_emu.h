// CUDA on the CPU, for tests: mamba_cuda.cu compiled by g++ with -DCUDA_EMULATION includes this instead of CUDA's headers.
//
// Each CUDA thread is a fiber. A block's threads run one at a time on the program's own thread and change places only where
// they meet: at __syncthreads, at intrinsics of a warp, at their end. So a run is repeatable, and the order in which threads run
// is a choice, CUDA_EMU_SCHEDULE:
//
//   forward   each thread as far as it gets, the first one first, blocks in order      (the default)
//   reverse   the same from the last thread and block
//   lockstep  all threads from one meeting place to the next, as a warp would
//   N         a random order of blocks, warps and lanes, from seed N
//
// A kernel without races gives the same bytes under all of them. What is wrong with a kernel ends the program with status 86
// and a line on standard error: threads that meet at different places, masks that name lanes which are gone, a barrier that
// some threads have left behind, writes behind the end of shared memory or of an allocation. Fresh memory holds 0xff (NaN).
// Built with -fsanitize=thread, barriers order memory and shuffles do not, so that ThreadSanitizer sees a missing barrier
// whatever the schedule; -fsanitize=address knows the fibers' stacks.
//
// CUDA_EMU_FAULT=NAME[:N] lets the Nth call of a runtime function fail (kernel: the Nth launch), CUDA_EMU_MEMORY limits
// the bytes of the device, CUDA_EMU_ARCH is its compute capability (80), for which CUDA_EMU_NO_CODE
// says that the program has no kernels.
//
// It cannot show: speed, fences and weak memory between blocks, bank conflicts, how the GPU rounds exp2 and rsqrt.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *);
void __tsan_release(void *);
}
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif
// The emulator's own bookkeeping is shared by all fibers and no part of what is tested.
#define EMU_UNSEEN __attribute__((no_sanitize("thread"), noinline))

// ---- Words of the language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- Numbers ----

inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float2int_rn(float f) { return std::isnan(f) ? 0 : f >= 0x1p31f ? INT32_MAX : f < -0x1p31f ? INT32_MIN : (int)lrintf(f); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}
inline unsigned __vsub4(unsigned a, unsigned b) {  // bytes
    unsigned r = 0;
    for (int i = 0; i < 32; i += 8) r |= (((a >> i) - (b >> i)) & 255u) << i;
    return r;
}
using std::max;
using std::min;

struct __half2 { uint16_t x, y; };
struct __nv_bfloat162 { uint16_t x, y; };

inline float emu_decode_half(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double v = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return (float)(h & 0x8000 ? -v : v);
}
inline const std::vector<float> emu_halves = [] {
    std::vector<float> v(65536);
    for (unsigned i = 0; i < 65536; i++) v[i] = emu_decode_half((uint16_t)i);
    return v;
}();
inline float emu_half_to_float(uint16_t h) { return emu_halves[h]; }
inline uint16_t emu_float_to_half(float f) {  // to nearest, ties to even
    unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more
    if (magnitude < 0x38800000) return (uint16_t)(sign | (unsigned)lrint(ldexp((double)__uint_as_float(magnitude), 24)));
    unsigned rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | rounded >> 13);
}
inline uint16_t emu_float_to_bf16(float f) {
    unsigned bits = __float_as_uint(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float emu_bf16_to_float(uint16_t b) { return __uint_as_float((unsigned)b << 16); }
inline __half2 __floats2half2_rn(float a, float b) { return {emu_float_to_half(a), emu_float_to_half(b)}; }
inline float2 __half22float2(__half2 h) { return {emu_half_to_float(h.x), emu_half_to_float(h.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {emu_float_to_bf16(a), emu_float_to_bf16(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {emu_bf16_to_float(b.x), emu_bf16_to_float(b.y)}; }

// ---- Fibers ----

namespace emu {

inline char *aligned_memory(size_t n) {
    void *p = nullptr;
    if (posix_memalign(&p, 256, n) != 0) abort();
    return (char *)p;
}

inline std::map<std::string, size_t> shared_limits;  // of kernels that may have more shared memory than 48 KB (ALLOW_SHARED)

enum State { READY, AT_BARRIER, AT_WARP, DONE };
enum { MAX_WORDS = 12, MAX_THREADS = 1024, MAX_COPIES = 256 };  // words that a lane gives to its warp; copies of a thread under way
#if defined(__SANITIZE_ADDRESS__)
enum { GUARD = 0 };         // AddressSanitizer has its own
#else
enum { GUARD = 64 };        // bytes behind each memory that nobody may write to
#endif
EMU_ASAN(const) size_t stack_bytes = 256 << 10;

struct Copy {
    void *to;
    const void *from;
    int n;                  // bytes
};

struct Fiber {
    void *sp;               // where it was left
    char *stack;
    State state;
    dim3 thread;
    unsigned index, mask;   // in the block; of lanes that it waits for
    int line;               // where it waits
    uint32_t words[MAX_WORDS];  // that it gives
    Copy copies[MAX_COPIES];    // that it has not waited for
    unsigned n_copies, group_ends[MAX_COPIES], n_groups;  // of them
    EMU_TSAN(void *shadow;)
    EMU_ASAN(void *fake_stack;)
};

struct Warp {
    uint32_t words[32][MAX_WORDS];  // given by each lane when they last met
    char order;             // for ThreadSanitizer: what __syncwarp releases and acquires
};

struct Block {              // the one that runs
    dim3 grid, block, at;
    unsigned n, n_done, n_at_barrier;
    char *shared;
    char order;
};

inline Fiber fibers[MAX_THREADS];
inline Warp warps[MAX_THREADS / 32];
inline Block block;
inline Fiber *current;
inline void *main_sp;
inline std::function<void()> body;
inline char launch_order, end_order;  // for ThreadSanitizer
inline const char *kernel_name = "?";
EMU_TSAN(inline void *main_shadow;)
EMU_ASAN(inline const void *main_stack; inline size_t main_stack_bytes;)

[[noreturn]] EMU_UNSEEN inline void fault(const char *what) {
    fprintf(stderr, "cuda_emu: %s in %s, block (%u, %u)", what, kernel_name, block.at.x, block.at.y);
    if (current) fprintf(stderr, ", thread %u, line %d", current->index, current->line);
    fputc('\n', stderr);
    fflush(stderr);
    _Exit(86);
}

// Saves the registers that a call keeps on this stack, and goes on with another one.
#if !defined(__x86_64__)
#error "the emulator changes stacks on x86-64 only"
#endif
extern "C" void emu_switch(void **save, void *to);
__asm__(".text\n.weak emu_switch\n.type emu_switch, @function\n"
        "emu_switch:\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
        ".size emu_switch, . - emu_switch\n");

// From a thread to the scheduler, which comes back when the thread may run.
EMU_UNSEEN inline void leave() {
    Fiber *f = current;
    EMU_ASAN(__sanitizer_start_switch_fiber(f->state == DONE ? nullptr : &f->fake_stack, main_stack, main_stack_bytes);)
    EMU_TSAN(__tsan_switch_to_fiber(main_shadow, 1);)
    emu_switch(&f->sp, main_sp);
    EMU_ASAN(__sanitizer_finish_switch_fiber(f->fake_stack, &main_stack, &main_stack_bytes);)
}

EMU_UNSEEN inline void enter(Fiber *f) {
    current = f;
    EMU_ASAN(void *fake; __sanitizer_start_switch_fiber(&fake, f->stack, stack_bytes);)
    EMU_TSAN(__tsan_switch_to_fiber(f->shadow, 1);)
    emu_switch(&main_sp, f->sp);
    EMU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
    current = nullptr;
}

EMU_UNSEEN inline void run_body() { body(); }

EMU_UNSEEN inline void fiber_main() {
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);)
    EMU_TSAN(__tsan_acquire(&launch_order);)
    run_body();
    EMU_TSAN(__tsan_release(&end_order);)
    current->state = DONE;
    block.n_done++;
    leave();
    abort();
}

EMU_UNSEEN inline void fiber_start(Fiber *f, unsigned index) {
    f->index = index;
    f->state = READY;
    f->line = 0;
    f->n_copies = f->n_groups = 0;
    f->thread = dim3(index % block.block.x, index / block.block.x % block.block.y, index / (block.block.x * block.block.y));
    if (!f->stack) {
        f->stack = (char *)aligned_alloc(4096, stack_bytes);
        EMU_TSAN(f->shadow = __tsan_create_fiber(0);)
    }
    void **top = (void **)(f->stack + stack_bytes);
    *--top = nullptr;       // where fiber_main would return to; keeps the stack aligned as a call does
    *--top = (void *)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f->sp = top;
}

// ---- Where threads meet ----

EMU_UNSEEN inline void barrier(int line) {
    Fiber *f = current;
    f->line = line;
    f->state = AT_BARRIER;
    EMU_TSAN(__tsan_release(&block.order);)
    if (++block.n_at_barrier < block.n) {
        if (block.n_done) fault("__syncthreads, which other threads have left behind");
        leave();
    } else {
        for (unsigned i = 0; i < block.n; i++) {
            if (fibers[i].line != line) fault("threads meet at different __syncthreads");
            fibers[i].state = READY;
        }
        block.n_at_barrier = 0;
    }
    EMU_TSAN(__tsan_acquire(&block.order);)
}

// Gives n words to the lanes of the mask, and waits for theirs, which are then in the warp. The last one to come lets all go on.
EMU_UNSEEN inline Warp *meet(unsigned mask, const uint32_t *words, int n, int line) {
    Fiber *f = current;
    const unsigned lane = f->index % 32, first = f->index - lane;
    Warp *w = &warps[f->index / 32];
    f->line = line;
    if (!(mask >> lane & 1)) fault("a lane is not in its own mask");
    f->mask = mask;
    f->state = AT_WARP;
    for (int i = 0; i < n; i++) f->words[i] = words[i];
    for (unsigned l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        if (first + l >= block.n || fibers[first + l].state == DONE) fault("a mask names a lane that has ended");
        Fiber *other = &fibers[first + l];
        if (other->state == AT_BARRIER) fault("a mask names a lane that waits at __syncthreads");
        if (other->state == READY) {
            leave();
            return w;
        }
        if (other->mask != mask || other->line != line) fault("lanes of one mask meet at different places");
    }
    for (unsigned l = 0; l < 32; l++)
        if (mask >> l & 1) {
            for (int i = 0; i < n; i++) w->words[l][i] = fibers[first + l].words[i];
            fibers[first + l].state = READY;
        }
    return w;
}

template <class T> T shuffle(unsigned mask, T value, unsigned from, int line) {
    static_assert(sizeof(T) == 4, "shuffles of 32 bits");
    uint32_t word;
    T result;
    memcpy(&word, &value, 4);
    Warp *w = meet(mask, &word, 1, line);
    if (from > 31 || !(mask >> from & 1)) fault("a shuffle from a lane outside its mask");
    memcpy(&result, &w->words[from][0], 4);
    return result;
}

// ---- Running a grid ----

struct Schedule {
    enum { FORWARD, REVERSE, LOCKSTEP, RANDOM } kind;
    uint64_t random;
};

inline Schedule schedule_of_environment() {
    const char *s = getenv("CUDA_EMU_SCHEDULE");
    if (!s || !*s || !strcmp(s, "forward")) return {Schedule::FORWARD, 0};
    if (!strcmp(s, "reverse")) return {Schedule::REVERSE, 0};
    if (!strcmp(s, "lockstep")) return {Schedule::LOCKSTEP, 0};
    return {Schedule::RANDOM, strtoull(s, nullptr, 10) * 0x9e3779b97f4a7c15u + 1};
}

EMU_UNSEEN inline void order_of(Schedule *s, unsigned *items, unsigned n) {
    for (unsigned i = 0; i < n; i++) items[i] = s->kind == Schedule::REVERSE ? n - 1 - i : i;
    for (unsigned i = n; s->kind == Schedule::RANDOM && i > 1; i--) {
        s->random = s->random * 6364136223846793005u + 1442695040888963407u;
        std::swap(items[i - 1], items[(s->random >> 33) % i]);
    }
}

// Each thread in its turn: as far as it gets, or (lockstep) to the next meeting place.
EMU_UNSEEN inline void run_block(Schedule *s) {
    static unsigned warp_order[MAX_THREADS / 32], lane_order[32];
    for (unsigned i = 0; i < block.n; i++) fiber_start(&fibers[i], i);
    block.n_done = block.n_at_barrier = 0;
    while (block.n_done < block.n) {
        bool ran = false;
        order_of(s, warp_order, (block.n + 31) / 32);
        for (unsigned w = 0; w < (block.n + 31) / 32; w++) {
            bool again = true;
            while (again) {
                again = false;
                order_of(s, lane_order, 32);
                for (unsigned l = 0; l < 32; l++) {
                    Fiber *f = &fibers[warp_order[w] * 32 + lane_order[l]];
                    if (warp_order[w] * 32 + lane_order[l] >= block.n || f->state != READY) continue;
                    enter(f);
                    ran = again = true;
                }
                if (s->kind == Schedule::LOCKSTEP) again = false;
                if (s->kind == Schedule::RANDOM && s->random >> 60 < 4) again = false;  // now and then another warp's turn
            }
        }
        if (!ran) fault("no thread can go on");
    }
}

EMU_UNSEEN inline void check_guard(const char *p, const char *what) {
    for (int i = 0; i < GUARD; i++)
        if ((unsigned char)p[i] != 0xa5) fault(what);
}

EMU_UNSEEN inline void run_grid(const char *name, dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()> &kernel) {
    Schedule s = schedule_of_environment();
    const unsigned n_blocks = grid.x * grid.y * grid.z;
    std::vector<unsigned> blocks(n_blocks);
    kernel_name = name;
    body = kernel;
    block.grid = grid;
    block.block = threads;
    block.n = threads.x * threads.y * threads.z;
    EMU_TSAN(main_shadow = __tsan_get_current_fiber();)
    if (!block.n || block.n > MAX_THREADS || !n_blocks || grid.y > 65535) fault("a launch that CUDA refuses");
    order_of(&s, blocks.data(), n_blocks);
    std::vector<char *> memories;  // kept to the end: to free one would order its block before the next, for ThreadSanitizer
    for (unsigned b : blocks) {
        block.at = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
        // Fresh for each block, so that nothing of another one can be mistaken for its own.
        block.shared = aligned_memory(shared_bytes + GUARD);
        memset(block.shared, 0xff, shared_bytes);
        memset(block.shared + shared_bytes, 0xa5, GUARD);
        EMU_TSAN(__tsan_release(&launch_order);)
        run_block(&s);
        check_guard(block.shared + shared_bytes, "a write behind the end of shared memory");
        memories.push_back(block.shared);
    }
    EMU_TSAN(__tsan_acquire(&end_order);)
    for (char *memory : memories) free(memory);
}

}  // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx (emu::block.at)
#define blockDim (emu::block.block)
#define gridDim (emu::block.grid)
#define DYNAMIC_SHARED(type, name) type *name = (type *)emu::block.shared
#define __syncthreads() emu::barrier(__LINE__)
#define __syncwarp() ((void)emu::meet(0xffffffffu, nullptr, 0, __LINE__))
#define __shfl_sync(mask, value, from) emu::shuffle(mask, value, (unsigned)(from), __LINE__)
#define __shfl_xor_sync(mask, value, x) emu::shuffle(mask, value, (emu::current->index % 32) ^ (unsigned)(x), __LINE__)

// ---- Copies past the registers ----
// Each is made when its thread waits for it, not before: a wait left out is seen as missing bytes.

namespace emu {

EMU_UNSEEN inline void add_copy(void *to, const void *from, int n) {
    if ((uintptr_t)to % (unsigned)n || (uintptr_t)from % (unsigned)n) fault("a copy that is not aligned");
    if (current->n_copies == MAX_COPIES) fault("too many copies under way");
    current->copies[current->n_copies++] = {to, from, n};
}

EMU_UNSEEN inline void end_copies() {
    if (current->n_groups == MAX_COPIES) fault("too many groups of copies");
    current->group_ends[current->n_groups++] = current->n_copies;
}

EMU_UNSEEN inline void wait_for_copies(unsigned n_open) {
    Fiber *f = current;
    const unsigned n_groups = f->n_groups > n_open ? f->n_groups - n_open : 0, n = n_groups ? f->group_ends[n_groups - 1] : 0;
    for (unsigned i = 0; i < f->n_copies; i++) {
        if (i < n) memcpy(f->copies[i].to, f->copies[i].from, (size_t)f->copies[i].n);
        else f->copies[i - n] = f->copies[i];
    }
    for (unsigned i = n_groups; i < f->n_groups; i++) f->group_ends[i - n_groups] = f->group_ends[i] - n;
    f->n_copies -= n;
    f->n_groups -= n_groups;
}

}  // namespace emu

template <int BYTES> inline void copy_async(void *to, const void *from) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "a copy that CUDA does not have");
    emu::add_copy(to, from, BYTES);
}
inline void copies_end() { emu::end_copies(); }
template <int N> inline void copies_wait() { emu::wait_for_copies(N); }

// Kernels run one after the other here.
inline void inputs_ready() {}
inline void next_may_start() {}
inline void prefetch(const void *) {}
inline float exp2_flushed(float x) { return exp2f(x); }

// ---- Tensor cores ----
// Fragments as the PTX manual draws them: lane = 4 g + q. A: rows g and g + 8; B: column g; D: rows g, g + 8, columns 2q, 2q + 1.

// m16n8k16 of half precision: a[0] row g, a[1] row g + 8 at k = 2q, 2q + 1; a[2], a[3] the same at k + 8; b[0], b[1] likewise.
EMU_UNSEEN inline void emu_mma_16(float d[4], const uint32_t a[4], const uint32_t b[2], float (*value)(uint16_t), int line) {
    uint32_t words[12];
    for (int i = 0; i < 6; i++)
        for (int half = 0; half < 2; half++) words[2 * i + half] = __float_as_uint(value((uint16_t)((i < 4 ? a[i] : b[i - 4]) >> 16 * half)));
    emu::Warp *w = emu::meet(0xffffffffu, words, 12, line);
    const unsigned lane = emu::current->index % 32, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) {
            const unsigned from = k % 8 / 2, at = k % 2, upper = k / 8;
            const float x = __uint_as_float(w->words[4 * g + from][4 * upper + 2 * (i / 2) + at]);
            const float y = __uint_as_float(w->words[4 * (2 * q + i % 2) + from][8 + 2 * upper + at]);
            d[i] = fmaf(x, y, d[i]);
        }
}
#define mma_f16(d, a, b) emu_mma_16(d, a, b, emu_half_to_float, __LINE__)
#define mma_bf16(d, a, b) emu_mma_16(d, a, b, emu_bf16_to_float, __LINE__)

// m16n8k16 of bytes: a0 row g, a1 row g + 8 at k = 4q to 4q + 3; b likewise.
EMU_UNSEEN inline void emu_mma_s8(int d[4], uint32_t a0, uint32_t a1, uint32_t b, int line) {
    const uint32_t words[3] = {a0, a1, b};
    emu::Warp *w = emu::meet(0xffffffffu, words, 3, line);
    const unsigned lane = emu::current->index % 32, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++)
        for (unsigned from = 0; from < 4; from++)
            d[i] = __dp4a((int)w->words[4 * g + from][i / 2], (int)w->words[4 * (2 * q + i % 2) + from][2], d[i]);
}
#define mma_s8(d, a0, a1, b) emu_mma_s8(d, a0, a1, b, __LINE__)
#define mma_s8_block(d, a, b) (mma_s8(d, a[0], a[1], b[0]), mma_s8(d, a[2], a[3], b[1]))

// ---- The runtime ----

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
    cudaErrorInvalidDeviceFunction = 98, cudaErrorNoKernelImageForDevice = 209, cudaErrorLaunchFailure = 719, cudaErrorUnknown = 999
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth,
    cudaDevAttrMultiProcessorCount
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
struct cudaDeviceProp { char name[256]; };
struct cudaFuncAttributes { int ptxVersion; };
typedef struct emu_stream *cudaStream_t;
typedef std::vector<std::function<void()>> *cudaGraph_t, *cudaGraphExec_t;

namespace emu {

inline cudaError_t lost = cudaSuccess;    // an error that stays, as that of a kernel does
inline cudaError_t last = cudaSuccess;    // one that cudaGetLastError() says once
inline cudaGraph_t captured;              // launches go here while a graph is captured
inline std::map<char *, size_t> allocations;
inline size_t allocated;

inline size_t memory_limit() {
    const char *limit = getenv("CUDA_EMU_MEMORY");
    return limit ? strtoull(limit, nullptr, 10) : (size_t)4 << 30;
}

// The error of this call of a runtime function, if CUDA_EMU_FAULT names it.
inline cudaError_t call(const char *name, cudaError_t error, bool stays = false) {
    static std::map<std::string, int> calls;
    const char *wanted = getenv("CUDA_EMU_FAULT");
    if (!wanted) return lost;
    std::string w = wanted;
    size_t colon = w.find(':');
    int n = colon == std::string::npos ? 1 : atoi(w.c_str() + colon + 1);
    if (w.substr(0, colon) == name && ++calls[name] == n) {
        if (stays) lost = error;
        return last = error;
    }
    return lost;
}

inline void check_allocations() {
    for (auto &a : allocations) check_guard(a.first + a.second, "a write behind the end of an allocation");
}

template <class F> void launch(const char *name, dim3 grid, dim3 threads, size_t shared_bytes, F kernel) {
    const auto limit = shared_limits.find(name);
    kernel_name = name;
    block.at = dim3(0, 0, 0);
    if (shared_bytes > (limit == shared_limits.end() ? 48 << 10 : limit->second)) fault("a launch with more shared memory than it asked for");
    auto run = [=] {
        if (call("kernel", cudaErrorLaunchFailure, true) == cudaSuccess) run_grid(name, grid, threads, shared_bytes, kernel);
    };
    if (captured) captured->push_back(run);
    else run();
}

}  // namespace emu

#define ALLOW_SHARED(kernel, bytes) (emu::shared_limits[#kernel] = (size_t)(bytes))
#define LAUNCH(kernel, grid, threads, shared_bytes, device, ...) \
    ((void)(device), emu::launch(#kernel, grid, threads, shared_bytes, [=] { kernel(__VA_ARGS__); }))

inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorNoDevice ? "no CUDA-capable device is detected" : e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version"
           : e == cudaErrorLaunchFailure ? "unspecified launch failure" : "unknown error";
}
inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = getenv("CUDA_EMU_NO_DEVICE") ? 0 : 1;
    if (getenv("CUDA_EMU_NO_DRIVER")) return cudaErrorInsufficientDriver;  // as the runtime says it
    cudaError_t old = emu::call("driver", cudaErrorInsufficientDriver);
    return old != cudaSuccess ? old : *n ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaDriverGetVersion(int *v) {
    *v = getenv("CUDA_EMU_NO_DRIVER") ? 0 : getenv("CUDA_EMU_FAULT") && !strncmp(getenv("CUDA_EMU_FAULT"), "driver", 6) ? 11080 : 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return emu::call("cudaSetDevice", cudaErrorUnknown); }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    snprintf(p->name, sizeof p->name, "emulated GPU");
    return emu::call("cudaGetDeviceProperties", cudaErrorUnknown);
}
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
    const char *arch = getenv("CUDA_EMU_ARCH");
    const int capability = arch ? atoi(arch) : 80;
    *v = a == cudaDevAttrComputeCapabilityMajor ? capability / 10 : a == cudaDevAttrComputeCapabilityMinor ? capability % 10
         : a == cudaDevAttrMemoryClockRate ? 1000000 : a == cudaDevAttrMultiProcessorCount ? 4 : 256;
    return emu::call("cudaDeviceGetAttribute", cudaErrorUnknown);
}
template <class K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, K) {
    const char *arch = getenv("CUDA_EMU_ARCH");
    a->ptxVersion = arch ? atoi(arch) : 80;
    return getenv("CUDA_EMU_NO_CODE") ? cudaErrorNoKernelImageForDevice : emu::call("cudaFuncGetAttributes", cudaErrorUnknown);
}
inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = emu::memory_limit();
    *free = *total > emu::allocated ? *total - emu::allocated : 0;
    return emu::call("cudaMemGetInfo", cudaErrorUnknown);
}
inline cudaError_t emu_malloc(void **p, size_t n) {
    cudaError_t e = emu::call("cudaMalloc", cudaErrorMemoryAllocation);
    if (e == cudaSuccess && emu::allocated + n > emu::memory_limit()) e = cudaErrorMemoryAllocation;
    if (e != cudaSuccess) return e;
    char *memory = emu::aligned_memory(n + emu::GUARD);
    memset(memory, 0xff, n);
    memset(memory + n, 0xa5, emu::GUARD);
    emu::allocations[memory] = n;
    emu::allocated += n;
    *p = memory;
    return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T **p, size_t n) { return emu_malloc((void **)p, n); }
inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    emu::check_allocations();
    emu::allocated -= emu::allocations[(char *)p];
    emu::allocations.erase((char *)p);
    free(p);
    return emu::lost;
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t n) {
    *p = (T *)malloc(n ? n : 1);
    return emu::call("cudaMallocHost", cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t) {
    cudaError_t e = emu::call("cudaMemcpyAsync", cudaErrorUnknown, true);
    if (e == cudaSuccess) memcpy(to, from, n);
    return e;
}
inline cudaError_t cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t) {
    memset(to, v, n);
    return emu::call("cudaMemsetAsync", cudaErrorUnknown);
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) {
    *s = nullptr;
    return emu::call("cudaStreamCreate", cudaErrorUnknown);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    emu::check_allocations();
    return emu::call("cudaStreamSynchronize", cudaErrorLaunchFailure, true);
}
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last, emu::lost); }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    cudaError_t e = emu::call("cudaStreamBeginCapture", cudaErrorUnknown);
    if (e == cudaSuccess) emu::captured = new std::vector<std::function<void()>>;
    return e;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {  // ends it in any case
    cudaError_t e = emu::call("cudaStreamEndCapture", cudaErrorUnknown);
    *g = emu::captured;
    emu::captured = nullptr;
    if (e == cudaSuccess) return e;
    cudaGraphDestroy(*g);
    *g = nullptr;
    return e;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *to, cudaGraph_t g, unsigned long long) {
    cudaError_t e = emu::call("cudaGraphInstantiate", cudaErrorMemoryAllocation);
    if (e == cudaSuccess) *to = new std::vector<std::function<void()>>(*g);
    return e;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
    cudaError_t failed = emu::call("cudaGraphLaunch", cudaErrorMemoryAllocation);
    if (failed == cudaSuccess) for (auto &launch : *e) launch();
    return failed;
}
