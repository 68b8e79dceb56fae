// What the CUDA bodies share: errors with the op's name, the device guard, the launch, shared memory, loads and stores
// in the compute type. With KNOWEDIT_SIMT the same source runs on the CPU (testing/simt.h).
//
// So that it can, kernels are launched by launch() and take shared memory from block_shared<T>() or
// dynamic_shared<T>(); tensor cores and asynchronous copies come from mma.cuh.
#pragma once

#ifdef KNOWEDIT_SIMT
#include "../testing/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace knowedit {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t status, const char* op) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(op) + " on CUDA: " + cudaGetErrorString(status));
}

// Makes `device` current, and the one before it again at the end.
class DeviceGuard {
  public:
    DeviceGuard(int device, const char* op) {
        check(cudaGetDevice(&before), op);
        if (device != before) check(cudaSetDevice(device), op);
    }
    ~DeviceGuard() { cudaSetDevice(before); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before = 0;
};

// ---- launching ----

// Blocks needed for `count` items, `per_block` each, along x.
inline unsigned blocks_for(int64_t count, int64_t per_block, const char* op) {
    const int64_t blocks = count / per_block + (count % per_block != 0);
    if (blocks > INT32_MAX)
        throw std::length_error(std::string(op) + " on CUDA: " + std::to_string(blocks) +
                                " blocks are needed, a grid holds 2147483647");
    return static_cast<unsigned>(blocks);
}

struct Grid {
    dim3 blocks;
    dim3 threads;
    size_t shared;  // dynamic, in bytes
    cudaStream_t stream;
};

// Enqueues kernel(args...); an empty grid is nothing to do. An error says which op it was.
template <typename... P, typename... A>
void launch(const char* op, const Grid& grid, void (*kernel)(P...), A... args) {
    if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
#ifdef KNOWEDIT_SIMT
    if (grid.shared > (48 << 10)) simt::allow_shared(reinterpret_cast<const void*>(kernel), grid.shared);
    simt::launch(op, kernel, grid.blocks, grid.threads, grid.shared, grid.stream, args...);
#else
    if (grid.shared > (48 << 10))
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)),
              op);
    // clang-format off
    kernel<<<grid.blocks, grid.threads, grid.shared, grid.stream>>>(args...);
    // clang-format on
#endif
    check(cudaGetLastError(), op);
}

// ---- shared memory ----

// The block's T: one for each type, uninitialised. Constructors do not run.
template <typename T>
__device__ __forceinline__ T& block_shared() {
#ifdef KNOWEDIT_SIMT
    static const char key = 0;
    return *static_cast<T*>(simt::block_memory(&key, sizeof(T), alignof(T)));
#else
    __shared__ T memory;
    return memory;
#endif
}

// The launch's `shared` bytes, aligned to 128.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef KNOWEDIT_SIMT
    return static_cast<T*>(simt::dynamic_memory());
#else
    extern __shared__ __align__(128) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
#endif
}

// ---- elements ----

template <typename T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

#ifndef KNOWEDIT_SIMT  // there they are those of cpu/half.h
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename S>
__device__ inline void narrow(S x, float* to) {
    *to = static_cast<float>(x);
}
template <typename S>
__device__ inline void narrow(S x, double* to) {
    *to = x;
}
template <typename S>
__device__ inline void narrow(S x, __nv_bfloat16* to) {
    *to = __float2bfloat16_rn(static_cast<float>(x));
}
template <typename S>
__device__ inline void narrow(S x, __half* to) {
    *to = __float2half_rn(static_cast<float>(x));
}
#endif

}  // namespace knowedit
