// out = x: the op that does nothing, to begin another from. Every file an op has is there, and as short as it can be.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct Null {
    const void* x;  // [rows, width], innermost stride 1
    void* out;      // [rows, width], contiguous; may not overlap x
    DType dtype;    // of both
    int64_t rows, width;
    int64_t x_row;  // stride, in elements
};

void null_cpu(const Null& params, int threads);

// Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void null_cuda(const Null& params, int device, void* stream);

}  // namespace knowedit
