// log softmax(softcap(hidden W^T + bias))[target], with [rows, vocab] never in memory.
//
// The vocabulary is taken in tiles with a running maximum and sum a row; logits are float (double for Float64).
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct TargetLogprob {
    const void* hidden;      // [rows, width], innermost stride 1
    const void* weight;      // [vocab, width], innermost stride 1
    const void* bias;        // [vocab], or null
    const int64_t* targets;  // [rows, count]
    void* out;               // [rows, count], float (double for Float64); NaN where a target is no token
    DType dtype;             // of hidden, weight and bias
    int64_t rows, width, vocab, count;
    int64_t hidden_row, weight_row;  // strides, in elements
    double softcap;                  // logits become softcap * tanh(logit / softcap); 0: none
};

// Into how many pieces to cut the vocabulary, so that there is work for every multiprocessor.
int64_t target_logprob_pieces(int64_t rows, int64_t vocab);

// parts: workspace [rows, pieces, 2] in the type of out. Enqueued on `stream` (a cudaStream_t) of `device`; does not
// wait.
void target_logprob_cuda(const TargetLogprob& params, void* parts, int64_t pieces, int device, void* stream);

}  // namespace knowedit
