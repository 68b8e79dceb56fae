// In place: y[r] += left[e] (right[e]^T x[r]) with e = index[r]: rows of many edited models in one batch.
//
// Products are summed in float (double for double) and y is rounded once. On the CPU the callers check `index`; on CUDA
// a row whose index is outside [-1, edits) becomes NaN.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct FactorStrides {  // in elements
    int64_t edit, width, rank;
};

struct LowRankRows {
    void* y;               // [rows, d_out], innermost stride 1
    const void* x;         // [rows, d_in], innermost stride 1
    const void* left;      // [edits, d_out, rank], any strides; best with stride 1 along d_out
    const void* right;     // [edits, d_in, rank], any strides; best with stride 1 along d_in
    const int64_t* index;  // [rows], -1: the row stays as it is
    DType dtype;           // of y and x
    DType factor_dtype;    // of left and right: dtype or Float32
    int64_t rows, edits, d_out, d_in, rank;
    int64_t y_row, x_row;  // strides, in elements
    FactorStrides left_strides, right_strides;
};

// Runs on `threads` threads at most; the result does not depend on how many, nor on what the other rows are.
void low_rank_rows_cpu(const LowRankRows& params, int threads);

// Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void low_rank_rows_cuda(const LowRankRows& params, int device, void* stream);

}  // namespace knowedit
