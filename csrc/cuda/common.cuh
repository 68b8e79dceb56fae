// What the CUDA bodies share: errors with the op's name, the device guard, loads and stores in the compute type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace knowedit {

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

}  // namespace knowedit
