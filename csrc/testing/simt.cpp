// The scheduler. Built without the sanitizers that kernels are built with, and free of standard containers on the
// threads' side: its own work is no part of what is checked.
#include "simt.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fiber.h"

namespace simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kRunners = 2 * kMostThreads;

enum class State { Ready, Barrier, Warp, Done };

struct Copy {
    void* to;
    const void* from;
    int bytes, zeros, group;
};

// A fiber with its stack, which runs one thread after another. A thread's number and its block decide which, so that
// the race detector, to which a fiber is a thread, sees those of different blocks apart.
struct Runner {
    Fiber fiber;
    bool started, idle;
};

struct Thread {
    Runner* on;
    State state;
    uint3 index;
    int number;
    // Where it waits.
    const char* what;
    const char* file;
    int line, bytes, snapshot;
    unsigned mask;
    const void* give;
    // Its asynchronous copies.
    Copy copies[128];
    int copy_count, group;
};

struct Snapshot {  // what the lanes of one warp operation gave
    alignas(kMost) char bytes[kWarp][kMost];
    int readers;
};

struct Allocation {
    const void* key;
    char* memory;
};

struct Block {
    dim3 grid, size;
    uint3 index;
    int threads, live, ready_count;
    int ready[kMostThreads];
    int barrier_count;
    unsigned waiting[kMostThreads / kWarp];  // lanes of a warp, in an operation of it
    void (*call)(const void*);
    const void* arguments;
    size_t dynamic;
    Allocation shared[16];
    int shared_count;
    char* order;  // its addresses order memory: one for each warp, one for the block
};

Runner runners[kRunners];
Thread threads[kMostThreads];
Snapshot snapshots[kMostThreads / kWarp][kWarp + 1];
Block block;
Fiber scheduler;
Thread* self = nullptr;
char* stacks = nullptr;
char orders[4096][kMostThreads / kWarp + 1];
char misuse[1024];  // what went wrong in the launch
constexpr int kMostGarbage = 1 << 16;
char* garbage[kMostGarbage];  // shared memory of the launch's blocks: no address serves twice
int garbage_count = 0;
uint64_t seed_given = 0, random_state = 0;

uint64_t draw() {  // splitmix64
    uint64_t x = random_state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

int pick(int count) { return seed_given == 0 ? 0 : seed_given == 1 ? count - 1 : static_cast<int>(draw() % count); }

void release_order(void* at) {
#ifdef SIMT_RACES
    __tsan_release(at);
#else
    (void)at;
#endif
}
void acquire_order(void* at) {
#ifdef SIMT_RACES
    __tsan_acquire(at);
#else
    (void)at;
#endif
}

struct Text {  // no std::string: an abandoned thread would leak it
    char chars[192];
};

Text place(const Thread& t) {
    Text text;
    std::snprintf(text.chars, sizeof text.chars, "thread (%u, %u, %u) of block (%u, %u, %u)", t.index.x, t.index.y,
                  t.index.z, block.index.x, block.index.y, block.index.z);
    return text;
}

Text where(const Thread& t) {
    Text text;
    if (t.state == State::Done)
        std::snprintf(text.chars, sizeof text.chars, "has ended");
    else
        std::snprintf(text.chars, sizeof text.chars, "waits in %s, line %d", t.what, t.line);
    return text;
}

[[noreturn]] void ended() {
    std::fputs("simt: a thread that ended was resumed\n", stderr);
    std::abort();
}

void leave() {                // to the scheduler, until it comes back
    release_order(&garbage);  // perhaps for good
    self->on->fiber.switch_to(scheduler);
}

// From a thread: the launch ends with this error.
__attribute__((format(printf, 1, 2))) [[noreturn]] void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(misuse, sizeof misuse, format, values);
    va_end(values);
    self->state = State::Done;
    leave();
    ended();
}

[[noreturn]] void fail_apart(const Thread& one, const Thread& other) {
    fail("%s %s, but %s %s", place(one).chars, where(one).chars, place(other).chars, where(other).chars);
}

void make_ready(Thread& t) {
    t.state = State::Ready;
    block.ready[block.ready_count++] = t.number;
}

void entry() {
    self->on->fiber.arrive(scheduler);
    for (;;) {
        acquire_order(&runners);
        block.call(block.arguments);
        self->state = State::Done, --block.live, self->on->idle = true;
        leave();
    }
}

// Where it can start: a runner that was abandoned in the midst of a thread begins anew.
void ready_runner(Runner& runner) {
    if (runner.started && runner.idle) return;
    const size_t size = kStack * kRunners;
    if (!stacks)
        stacks = static_cast<char*>(
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    if (runner.started) runner.fiber.stop();
    runner.fiber.start(stacks + (&runner - runners) * kStack, entry);
    runner.started = true;
}

void prepare_block(uint3 index, uint64_t number) {
    block.index = index, block.live = block.threads, block.ready_count = 0, block.barrier_count = 0;
    block.shared_count = 0, block.order = orders[number % 4096];
    for (int n = 0; n < block.threads; ++n) {
        Thread& t = threads[n];
        t.on = &runners[(n + number * 37) % std::max(64, 2 * block.threads)];
        ready_runner(*t.on);
        t.on->idle = false;
        t.number = n, t.snapshot = -1, t.copy_count = 0, t.group = 0;
        t.index = {n % block.size.x, n / block.size.x % block.size.y, n / (block.size.x * block.size.y)};
        make_ready(t);
        block.waiting[n / kWarp] = 0;
        for (int i = 0; n % kWarp == 0 && i <= kWarp; ++i) snapshots[n / kWarp][i].readers = 0;
    }
}

// The whole block, or an error in `misuse`.
void run_block() {
    while (block.ready_count && !misuse[0]) {
        const int at = pick(block.ready_count);
        self = &threads[block.ready[at]];
        --block.ready_count;
        if (seed_given > 1)
            block.ready[at] = block.ready[block.ready_count];
        else  // the rest stays in order
            memmove(block.ready + at, block.ready + at + 1, sizeof(int) * (block.ready_count - at));
        scheduler.switch_to(self->on->fiber);
    }
    if (misuse[0] || !block.live) return;
    const Thread* stuck = nullptr;  // the barrier, where there is one: warps stuck in it say less
    for (int n = 0; n < block.threads; ++n)
        if (threads[n].state != State::Done && (!stuck || threads[n].state == State::Barrier)) stuck = &threads[n];
    const Thread* other = nullptr;
    for (int n = 0; n < block.threads; ++n) {
        const Thread& t = threads[n];
        const bool awaited =
            stuck->state == State::Barrier || (n / kWarp == stuck->number / kWarp && (stuck->mask >> (n % kWarp) & 1));
        if (awaited && (t.state != stuck->state || t.line != stuck->line || t.mask != stuck->mask)) other = &t;
    }
    if (other)
        std::snprintf(misuse, sizeof misuse, "%s %s, but %s %s", place(*stuck).chars, where(*stuck).chars,
                      place(*other).chars, where(*other).chars);
    else
        std::snprintf(misuse, sizeof misuse, "%s %s, for lanes that do not exist", place(*stuck).chars,
                      where(*stuck).chars);
}

}  // namespace

void set_seed(uint64_t seed) { seed_given = random_state = seed; }

void run(const char* op, const void* kernel, dim3 grid, dim3 size, size_t shared, cudaStream_t stream,
         void (*thread)(const void*), const void* arguments) {
    if (!admit({grid, size, shared, stream, device()}, kernel)) return;
    block = Block{};
    block.grid = grid, block.size = size, block.call = thread, block.arguments = arguments;
    block.threads = static_cast<int>(size.x * size.y * size.z), block.dynamic = shared;
    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> order(count);
    for (uint64_t n = 0; n < count; ++n) order[n] = seed_given == 1 ? count - 1 - n : n;
    if (seed_given > 1)
        for (uint64_t n = count; n > 1; --n) std::swap(order[n - 1], order[draw() % n]);
    release_order(&runners);  // threads see what the host wrote
    for (uint64_t n : order) {
        const uint64_t plane = uint64_t{grid.x} * grid.y;
        prepare_block({static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n % plane / grid.x),
                       static_cast<unsigned>(n / plane)},
                      n);
        run_block();
        if (misuse[0]) break;
    }
    acquire_order(&garbage);  // the host sees what threads wrote once all have ended
    while (garbage_count) std::free(garbage[--garbage_count]);
    if (!misuse[0]) return;
    const std::string what = std::string(op) + ": " + misuse;
    misuse[0] = 0;
    throw std::runtime_error(what);
}

uint3 thread_index() { return self->index; }
uint3 block_index() { return block.index; }
dim3 block_size() { return block.size; }
dim3 grid_size() { return block.grid; }
int lane() { return self->number % kWarp; }

void* block_memory(const void* key, size_t bytes, size_t align) {
    for (int i = 0; i < block.shared_count; ++i)
        if (block.shared[i].key == key) return acquire_order(&block.shared[i]), block.shared[i].memory;
    if (block.shared_count == 16 || garbage_count == kMostGarbage) fail("too many pieces of shared memory");
    // Aligned at its start and exact at its end: a byte more is not the block's.
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max<size_t>(align, 16), bytes)) fail("no memory for shared memory");
    memset(memory, 0xff, bytes);  // NaN in every floating type
    garbage[garbage_count++] = static_cast<char*>(memory);
    release_order(&block.shared[block.shared_count]);  // the filling is no race
    block.shared[block.shared_count++] = {key, static_cast<char*>(memory)};
    return memory;
}

void* dynamic_memory() { return block_memory(&block.dynamic, block.dynamic, 128); }

void barrier(const char* file, int line) {
    Thread& me = *self;
    me.what = "__syncthreads", me.file = file, me.line = line, me.mask = 0, me.state = State::Barrier;
    void* order = &block.order[kMostThreads / kWarp];
    release_order(order);
    if (++block.barrier_count < block.threads) {
        leave();
        acquire_order(order);
        return;
    }
    for (int n = 0; n < block.threads; ++n) {
        const Thread& t = threads[n];
        if (t.line != line || t.file != file) fail_apart(t, me);
    }
    block.barrier_count = 0;
    for (int n = 0; n < block.threads; ++n)  // this one too, so that it has no head start
        make_ready(threads[n]);
    leave();
    acquire_order(order);
}

namespace {

// Whether all lanes of `me`'s operation have come.
bool complete(const Thread& me, int first) {
    for (int i = 0; i < kWarp; ++i) {
        if (!(me.mask >> i & 1)) continue;
        if (first + i >= block.threads) return false;
        const Thread& t = threads[first + i];
        if (t.state != State::Warp || t.mask != me.mask) return false;
        if (t.line != me.line || t.bytes != me.bytes || (t.what != me.what && strcmp(t.what, me.what)))
            fail_apart(t, me);
    }
    return true;
}

void copy_bytes(char* to, const char* from, int count) {  // not memcpy, which the race detector watches
    for (int i = 0; i < count; ++i) static_cast<volatile char*>(to)[i] = from[i];
}

}  // namespace

const char* gather(const char* what, unsigned mask, const void* give, int bytes, bool fence, int line) {
    Thread& me = *self;
    const int warp = me.number / kWarp, first = warp * kWarp;
    me.what = what, me.line = line, me.bytes = bytes, me.mask = mask, me.give = give;
    if (!(mask >> lane() & 1)) fail("%s is not in its own mask in %s, line %d", place(me).chars, what, line);
    if (me.snapshot >= 0) --snapshots[warp][me.snapshot].readers;
    me.state = State::Warp, me.snapshot = -1;
    void* order = &block.order[warp];
    if (fence) release_order(order);
    block.waiting[warp] |= 1u << lane();
    if ((block.waiting[warp] & mask) == mask && complete(me, first)) {
        block.waiting[warp] &= ~mask;
        int at = 0;
        while (snapshots[warp][at].readers) ++at;
        for (int i = 0; i < kWarp; ++i) {
            if (!(mask >> i & 1)) continue;
            Thread& t = threads[first + i];
            copy_bytes(snapshots[warp][at].bytes[i], static_cast<const char*>(t.give), bytes);
            ++snapshots[warp][at].readers, t.snapshot = at;
            make_ready(t);
        }
    }
    leave();
    if (fence) acquire_order(order);
    return snapshots[warp][me.snapshot].bytes[0];
}

void check_source(unsigned mask, int source, int line) {
    if (!(mask >> source & 1))
        fail("%s reads lane %d, which is not in the mask, line %d", place(*self).chars, source, line);
}

void copy_later(void* to, const void* from, int bytes, int zeros) {
    Thread& me = *self;
    if (me.copy_count == 128) fail("more than 128 asynchronous copies of a thread under way");
    const uintptr_t size = bytes + zeros, places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (places % size) fail("%s copies %d bytes asynchronously, but not aligned so", place(me).chars, bytes + zeros);
    me.copies[me.copy_count++] = {to, from, bytes, zeros, me.group};
}

void commit_copies() { ++self->group; }

void await_copies(int pending) {
    Thread& me = *self;
    int kept = 0;
    for (int i = 0; i < me.copy_count; ++i) {
        const Copy& c = me.copies[i];
        if (c.group < me.group - pending) {
            memcpy(c.to, c.from, c.bytes);
            memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
        } else {
            me.copies[kept++] = c;
        }
    }
    me.copy_count = kept;
}

}  // namespace simt
