// In place: the lower Cholesky factor of a symmetric positive definite matrix, in blocks, to the precision of its type.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct CholeskyFailure {
    int64_t order;  // 0: none; else the order of the first leading minor that is not positive
    double pivot;   // what its last pivot is
};

struct Cholesky {
    void* a;                   // [width, width], innermost stride 1; only the lower triangle is read and written
    DType dtype;               // Float64 or Float32
    int64_t width, row;        // row: stride in elements
    CholeskyFailure* failure;  // on the device; after a failure the factor is not one
};

// Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void cholesky_cuda(const Cholesky& params, int device, void* stream);

}  // namespace knowedit
