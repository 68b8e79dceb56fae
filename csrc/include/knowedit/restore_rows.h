// In place: hidden[rows[i]] = source[source_rows[i]], or += when add.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct RestoreRows {
    void* hidden;                // [n, width], innermost stride 1
    const int64_t* rows;         // [count], unique
    const void* source;          // [s, width], innermost stride 1; may be hidden when no row is both read and written
    const int64_t* source_rows;  // [count]
    DType hidden_dtype;
    DType source_dtype;  // hidden_dtype, Float32 or Float64
    int64_t count, width;
    int64_t hidden_row, source_row;  // strides, in elements
    bool add;                        // the sum is taken in float (double if source is) and rounded once
};

void restore_rows_cpu(const RestoreRows& params, int threads);

// Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void restore_rows_cuda(const RestoreRows& params, int device, void* stream);

}  // namespace knowedit
