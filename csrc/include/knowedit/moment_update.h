// In place: the lower triangle of acc += that of x^T diag(mask) x.
//
// Products are summed in float for `sum_rows` rows, then added to acc. Numbers of float32 x are multiplied as sums of
// three bfloat16 ones, which they are exactly.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct MomentUpdate {
    void* acc;         // [width, width], innermost stride 1; what is above the diagonal stays as it is
    const void* x;     // [rows, width], innermost stride 1
    const bool* mask;  // [rows], or null: all rows count
    DType acc_dtype;   // Float32 or Float64
    DType x_dtype;     // Float32, BFloat16 or Float16
    int64_t rows, width;
    int64_t acc_row, x_row;  // strides, in elements
    int64_t sum_rows;        // rounded up to a multiple of 32
};

// Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void moment_update_cuda(const MomentUpdate& params, int device, void* stream);

// The same by wgmma and TMA (sum_rows: rounded up to a multiple of 64), where that can be: on Hopper, with code for
// sm_90a in this build, for 16-bit rows that lie 16-byte aligned. std::invalid_argument elsewhere. in_pairs: two blocks
// a cluster, which bring what both read once.
void moment_update_wgmma_cuda(const MomentUpdate& params, bool in_pairs, int device, void* stream);
bool moment_update_has_wgmma(const MomentUpdate& params, int device);

}  // namespace knowedit
