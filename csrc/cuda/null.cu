// One block a row. Run on the CPU in the tests (testing/simt.h); not yet run on a GPU.
#include "common.cuh"
#include "knowedit/null.h"

namespace knowedit {
namespace {

constexpr const char* kOp = "null";
constexpr int kBlock = 256;

template <typename T>
__global__ void copy_row(Null p) {
    const T* from = static_cast<const T*>(p.x) + blockIdx.x * p.x_row;
    T* to = static_cast<T*>(p.out) + blockIdx.x * p.width;
    for (int64_t c = threadIdx.x; c < p.width; c += blockDim.x) to[c] = from[c];
}

}  // namespace

void null_cuda(const Null& p, int device, void* stream) {
    if (p.rows == 0 || p.width == 0) return;
    const DeviceGuard guard(device, kOp);
    const Grid grid{blocks_for(p.rows, 1, kOp), kBlock, 0, static_cast<cudaStream_t>(stream)};
    switch (p.dtype) {
        case DType::Float32:
            return launch(kOp, grid, copy_row<float>, p);
        case DType::Float64:
            return launch(kOp, grid, copy_row<double>, p);
        case DType::BFloat16:
            return launch(kOp, grid, copy_row<__nv_bfloat16>, p);
        case DType::Float16:
            return launch(kOp, grid, copy_row<__half>, p);
    }
}

}  // namespace knowedit
