// Runs CUDA kernel source on the CPU, block by block, so that kernels are tested where there is no GPU.
//
// A .cu file compiled with -DKNOWEDIT_SIMT gets this header (through cuda/common.cuh) in place of CUDA's. Every CUDA
// thread is a context of its own that runs until it waits at a barrier or in a warp operation; which one runs next is
// drawn by seed, so code that lacks a barrier gives wrong results. A barrier that some threads do not reach, lanes of a
// warp that wait in different operations and launches that a GPU would refuse are errors that name the kernel. Blocks
// run one after the other in an order drawn by seed: a block must not wait for another.
//
// Shared memory comes from block_shared<T>() and dynamic_shared<T>() of common.cuh only: here it is heap memory of the
// exact size, filled with NaN, so that AddressSanitizer sees what lies outside. Under -fsanitize=thread (SIMT_RACES)
// threads count as parallel unless a barrier or __syncwarp orders them; a shuffle does not. What waits for the device
// (cudaStreamSynchronize, cudaMemcpy, cudaMalloc) is left out on purpose: a launch must not.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cpu/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- types ----

using __nv_bfloat16 = knowedit::BFloat16;
using __half = knowedit::Float16;

#define SIMT_VECTOR(T, name, align)                            \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
    struct alignas(align) name##4 { T x, y, z, w; };           \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(float, float, 16)
SIMT_VECTOR(double, double, 16)
SIMT_VECTOR(int, int, 16)
SIMT_VECTOR(unsigned, uint, 16)
SIMT_VECTOR(unsigned short, ushort, 8)
#undef SIMT_VECTOR

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half2 {
    __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return knowedit::widen(x); }
inline float __half2float(__half x) { return knowedit::widen(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    __nv_bfloat16 to;
    return knowedit::narrow(x, &to), to;
}
inline __half __float2half_rn(float x) {
    __half to;
    return knowedit::narrow(x, &to), to;
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {knowedit::widen(x.x), knowedit::widen(x.y)}; }
inline float2 __half22float2(__half2 x) { return {knowedit::widen(x.x), knowedit::widen(x.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// ---- the runtime: what launch code may call ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

namespace simt {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- for tests ----

struct Launch {  // of a kernel, or of an asynchronous fill or copy (grid 0)
    dim3 grid, block;
    size_t shared;  // dynamic, in bytes
    cudaStream_t stream;
    int device;
};
void set_seed(uint64_t seed);  // 0: threads in order; 1: in reverse; else drawn
std::vector<Launch>& launches();
void fail_next_launch(cudaError_t status);
int device();

// ---- for the launch function of common.cuh ----

void allow_shared(const void* kernel, size_t bytes);
// Records the operation (kernel: null for a fill or a copy); false where it must not start, as cudaGetLastError says.
bool admit(const Launch& launch, const void* kernel);
// Calls thread(arguments) once in every thread of every block. Throws std::runtime_error, naming `op`, on misuse.
void run(const char* op, const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
         void (*thread)(const void* arguments), const void* arguments);

template <typename... P, typename... A>
void launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A&&... args) {
    using Call = std::pair<void (*)(P...), std::tuple<P...>>;
    const Call call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
    const auto thread = [](const void* arguments) {
        const Call& to = *static_cast<const Call*>(arguments);
        std::apply(to.first, to.second);
    };
    run(op, reinterpret_cast<const void*>(kernel), grid, block, shared, stream, thread, &call);
}

// ---- for device code ----

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
void* block_memory(const void* key, size_t bytes, size_t align);  // one allocation a block and key
void* dynamic_memory();
void barrier(const char* file, int line);
int lane();

constexpr int kMost = 64;  // bytes a lane may give
// Waits for the lanes of `mask`; what lane i gave lies at the result + i * kMost until this lane's next warp operation.
// Orders memory only when `fence`.
const char* gather(const char* what, unsigned mask, const void* give, int bytes, bool fence, int line);

template <typename T>
class Lanes {  // what each lane gave
  public:
    Lanes(const char* what, unsigned mask, const T& give, int line)
        : from(gather(what, mask, &give, sizeof(T), false, line)) {
        static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMost);
    }
    const T& operator[](int lane) const { return *reinterpret_cast<const T*>(from + lane * kMost); }

    const char* const from;
};

// cp.async: bytes arrive when the thread waits for their group, not before.
void copy_later(void* to, const void* from, int bytes, int zeros);
void commit_copies();
void await_copies(int pending);

void check_source(unsigned mask, int source, int line);  // a lane outside the mask has no value

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
    const Lanes<T> all("a shuffle", mask, value, line);
    check_source(mask, source, line);
    return all[source];
}

// The lane that `width`-wide segments give for lane + delta: its own where that leaves the segment.
inline int within(int from, int to, int width) {
    return to >= from / width * width && to < (from / width + 1) * width ? to : from;
}

template <typename T, typename F>
T reduce(unsigned mask, T value, int line, F join) {
    const Lanes<T> all("a reduction", mask, value, line);
    bool first = true;
    for (int i = 0; i < kWarp; ++i)
        if (mask >> i & 1) value = first ? all[i] : join(value, all[i]), first = false;
    return value;
}

template <typename T, typename F>
T update(T* at, F change) {
    T before, after;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    do after = change(before);
    while (!__atomic_compare_exchange(at, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = simt::kWarp;

// The call's line is part of a barrier: all threads must wait at the same one.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::barrier(file, line);
}
inline void __syncwarp(unsigned mask = simt::kAllLanes, int line = __builtin_LINE()) {
    simt::gather("__syncwarp", mask, nullptr, 0, true, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarp, int line = __builtin_LINE()) {
    const int lane = simt::lane();
    return simt::shuffle(mask, value, lane / width * width + (source & (width - 1)), line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = simt::kWarp, int line = __builtin_LINE()) {
    const int lane = simt::lane(), to = lane ^ bits;
    return simt::shuffle(mask, value, to < (lane / width + 1) * width ? to : lane, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp, int line = __builtin_LINE()) {
    const int lane = simt::lane();
    return simt::shuffle(mask, value, simt::within(lane, lane - static_cast<int>(delta), width), line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp, int line = __builtin_LINE()) {
    const int lane = simt::lane();
    return simt::shuffle(mask, value, simt::within(lane, lane + static_cast<int>(delta), width), line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    const simt::Lanes<int> all("a ballot", mask, predicate, line);
    unsigned votes = 0;
    for (int i = 0; i < simt::kWarp; ++i)
        if ((mask >> i & 1) && all[i]) votes |= 1u << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) == mask;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, int line = __builtin_LINE()) {
    return simt::reduce(mask, value, line, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, int line = __builtin_LINE()) {
    return simt::reduce(mask, value, line, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, int line = __builtin_LINE()) {
    return simt::reduce(mask, value, line, [](T a, T b) { return std::min(a, b); });
}

template <typename T>
T atomicAdd(T* at, T value) {
    return simt::update(at, [=](T x) { return x + value; });
}
template <typename T>
T atomicMax(T* at, T value) {
    return simt::update(at, [=](T x) { return std::max(x, value); });
}
template <typename T>
T atomicMin(T* at, T value) {
    return simt::update(at, [=](T x) { return std::min(x, value); });
}
template <typename T>
T atomicExch(T* at, T value) {
    return simt::update(at, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
    return simt::update(at, [=](T x) { return x == expected ? value : x; });
}

// ---- arithmetic; the fast versions are exact here ----

using std::max;
using std::min;

template <typename T>
T __ldg(const T* from) {
    return *from;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN becomes 0
inline float __int_as_float(int x) {
    float to;
    return memcpy(&to, &x, 4), to;
}
inline int __float_as_int(float x) {
    int to;
    return memcpy(&to, &x, 4), to;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
