// Causal attention of packed rows over the tree of their segments.
//
// A row at position p of segment s attends to its own segment's positions <= p; then, walking up, to the parent's
// positions below the segment's start, and so on to the root. scores = scale * q.k, bent where there is a softcap, plus
// the bias of the key's position; softmax in float (double for double), over the row's keys and, where there is one,
// its head's sink: a score without a value. The table is trusted here: callers check it.
#pragma once

#include <cstdint>

#include "knowedit/dtype.h"

namespace knowedit {

struct Segment {
    int32_t query_row;  // first row of q, -1: no queries
    int32_t kv_row;     // first row of k and v
    int32_t position;   // token position of that row
    int32_t length;     // rows
    int32_t parent;     // line of the parent in the table, -1: a root
};

struct TreeAttention {
    const void* q;            // [rows, heads, head_dim], innermost stride 1
    const void* k;            // [kv_rows, kv_heads, head_dim], innermost stride 1
    const void* v;            // [kv_rows, kv_heads, head_dim], innermost stride 1
    void* out;                // [rows, heads, head_dim] contiguous; rows of no segment become zero
    const Segment* segments;  // [segment_count]
    DType dtype;              // of q, k, v, out
    int64_t rows, heads, kv_heads, head_dim, segment_count;
    int64_t q_row, q_head;  // strides, in elements
    int64_t k_row, k_head;
    int64_t v_row, v_head;
    double scale;
    int64_t window;     // position j is visible to p when p - window < j <= p; 0: no window
    double softcap;     // scores become softcap * tanh(score / softcap); 0: none
    const void* sinks;  // [heads], float (double for double); null: none
    const void* bias;   // [heads, positions], float (double for double), added to scores of keys there; null: none
    int64_t positions;  // more than any key's, where there is a bias
};

struct TreeAttentionBackward {
    TreeAttention forward;  // its out is not read
    const void* grad;       // [rows, heads, head_dim], innermost stride 1
    void* dq;               // [rows, heads, head_dim] contiguous
    void *dk, *dv;          // [kv_rows, kv_heads, head_dim] contiguous
    void* stats;            // workspace [rows, heads, 2], float (double for double)
    int64_t kv_rows;
    int64_t grad_row, grad_head;  // strides, in elements
    int64_t frozen = 0;           // of the first key rows: their gradient is not computed, but zero
};

// Runs on `threads` threads at most; the result does not depend on how many.
void tree_attention_cpu(const TreeAttention& params, int threads);
// Float32 and Float64 only; stats is not used. Every element of dq, dk and dv is written.
void tree_attention_backward_cpu(const TreeAttentionBackward& params, int threads);

// owner: workspace [rows], int32. Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.
void tree_attention_cuda(const TreeAttention& params, int32_t* owner, int device, void* stream);
// Every element of dq, dk and dv is written; the result is the same every time. owner: [rows + 2 * ceil(kv_rows / 8)].
void tree_attention_backward_cuda(const TreeAttentionBackward& params, int32_t* owner, int device, void* stream);

}  // namespace knowedit
