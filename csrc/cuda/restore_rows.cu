// One block a row. Run on the CPU in the tests (testing/simt.h); not yet run on a GPU.
#include <type_traits>

#include "common.cuh"
#include "knowedit/restore_rows.h"

namespace knowedit {
namespace {

constexpr const char* kOp = "restore_rows";
constexpr int kBlock = 256;

template <typename T, typename S>
__global__ void move_row(RestoreRows p) {
    using Sum = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;
    T* to = static_cast<T*>(p.hidden) + p.rows[blockIdx.x] * p.hidden_row;
    const S* from = static_cast<const S*>(p.source) + p.source_rows[blockIdx.x] * p.source_row;
    for (int64_t c = threadIdx.x; c < p.width; c += blockDim.x) {
        const Sum value = widen(from[c]);
        narrow(p.add ? static_cast<Sum>(widen(to[c])) + value : value, to + c);
    }
}

template <typename T>
void from_any(const RestoreRows& p, cudaStream_t stream) {
    const Grid grid{blocks_for(p.count, 1, kOp), kBlock, 0, stream};
    if (p.source_dtype == p.hidden_dtype)
        launch(kOp, grid, move_row<T, T>, p);
    else if (p.source_dtype == DType::Float64)
        launch(kOp, grid, move_row<T, double>, p);
    else
        launch(kOp, grid, move_row<T, float>, p);
}

}  // namespace

void restore_rows_cuda(const RestoreRows& p, int device, void* stream) {
    if (p.count == 0 || p.width == 0) return;
    const DeviceGuard guard(device, kOp);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.hidden_dtype) {
        case DType::Float32:
            from_any<float>(p, on);
            break;
        case DType::Float64:
            from_any<double>(p, on);
            break;
        case DType::BFloat16:
            from_any<__nv_bfloat16>(p, on);
            break;
        case DType::Float16:
            from_any<__half>(p, on);
            break;
    }
}

}  // namespace knowedit
