// One line of PTX each, for sm_90a only: barriers in shared memory, TMA, wgmma. Addresses are those of the shared
// window.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common.cuh"
#include "panels_sm90.h"

namespace knowedit {
namespace sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// ---- barriers: a phase ends when `arrivals` have arrived and the bytes expected are there ----

__device__ __forceinline__ void init_barrier(uint32_t at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

// For the thread that initialised them: before the block's barrier.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint32_t at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

#define KNOWEDIT_TRY_WAIT(scope)             \
    asm volatile(                            \
        "{\n"                                \
        ".reg .pred done;\n"                 \
        "mbarrier.try_wait.parity" scope     \
        ".shared::cta.b64 done, [%1], %2;\n" \
        "selp.u32 %0, 1, 0, done;\n"         \
        "}"                                  \
        : "=r"(done)                         \
        : "r"(at), "r"(parity)               \
        : "memory")

// Until the phase of this parity has ended; that before the first counts as one of parity 1. in_cluster: another block
// may have arrived.
template <bool in_cluster>
__device__ __forceinline__ void await(uint32_t at, uint32_t parity) {
    uint32_t done;
    do
        if constexpr (in_cluster)
            KNOWEDIT_TRY_WAIT(".acquire.cluster");
        else
            KNOWEDIT_TRY_WAIT("");
    while (!done);
}

#undef KNOWEDIT_TRY_WAIT

// At the barrier that lies at the same place in block number `block` of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t at, int block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(at),
        "r"(block)
        : "memory");
}

// All threads of all blocks of the cluster; what each wrote before is seen by all behind it.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// For `threads` threads, which all name the same barrier (not 0: that is __syncthreads).
template <int barrier, int threads>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(barrier), "n"(threads) : "memory");
}

// What this thread stored to shared memory comes before what TMA and wgmma do there later.
__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers: a multiple of 8 for each thread of a warpgroup, out of what the block started with ----

template <int count>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- TMA ----

// The box whose first element is (column, row), zeros outside the tensor; its bytes arrive at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* from, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same into the blocks of the cluster whose bits are set in `blocks`: at this place, and for the barrier at this
// place, in each.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* from, int column, int row,
                                            uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(from), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// ---- wgmma: all 128 threads of a warpgroup ----

// Before the first multiply after the sums (or operands in registers) were touched.
__device__ __forceinline__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void await_products() {  // until at most `pending` groups are under way
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving what it does with the sums across.
__device__ __forceinline__ void settle(float (&sum)[kSums]) {
#pragma unroll
    for (float& x : sum) asm volatile("" : "+f"(x)::"memory");
}

#define KNOWEDIT_SUMS(i)                                                                                              \
    "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),           \
        "+f"(sum[i + 6]), "+f"(sum[i + 7]), "+f"(sum[i + 8]), "+f"(sum[i + 9]), "+f"(sum[i + 10]), "+f"(sum[i + 11]), \
        "+f"(sum[i + 12]), "+f"(sum[i + 13]), "+f"(sum[i + 14]), "+f"(sum[i + 15])
// D += A B, neither negated, both transposed.
#define KNOWEDIT_WGMMA(type)                                                                                \
    asm volatile(                                                                                           \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                                      \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
        " {"                                                                                                \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, add, 1, 1, 1, 1;\n}"                                                                   \
        : KNOWEDIT_SUMS(0), KNOWEDIT_SUMS(16), KNOWEDIT_SUMS(32), KNOWEDIT_SUMS(48), KNOWEDIT_SUMS(64),     \
          KNOWEDIT_SUMS(80), KNOWEDIT_SUMS(96), KNOWEDIT_SUMS(112)                                          \
        : "l"(left), "l"(right))

// sum += 64 x 16 by 16 x 256 of the operands that the descriptors name.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[kSums], uint64_t left, uint64_t right) {
    if constexpr (std::is_same_v<T, __half>)
        KNOWEDIT_WGMMA("f16");
    else
        KNOWEDIT_WGMMA("bf16");
}

#undef KNOWEDIT_WGMMA
#undef KNOWEDIT_SUMS

}  // namespace sm90
}  // namespace knowedit
