// The only file that sees Python. Tensors arrive as integers (data_ptr), shapes and strides as numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "knowedit/cholesky.h"
#include "knowedit/cpu_isa.h"
#include "knowedit/low_rank_rows.h"
#include "knowedit/moment_update.h"
#include "knowedit/null.h"
#include "knowedit/restore_rows.h"
#include "knowedit/target_logprob.h"
#include "knowedit/tree_attention.h"

namespace py = pybind11;
using namespace pybind11::literals;
using Pointer = std::uintptr_t;
using Strides = std::array<std::int64_t, 2>;  // of the row and the head dimension

namespace knowedit {
namespace {

template <typename T = void>
T* at(Pointer address) {
    return reinterpret_cast<T*>(address);
}

TreeAttention tree_attention_params(Pointer q, Pointer k, Pointer v, Pointer out, Pointer segments, int dtype,
                                    int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t segment_count, Strides q_strides, Strides k_strides, Strides v_strides,
                                    double scale, int64_t window, double softcap, Pointer sinks, Pointer bias,
                                    int64_t positions) {
    return {at(q),
            at(k),
            at(v),
            at(out),
            at<const Segment>(segments),
            static_cast<DType>(dtype),
            rows,
            heads,
            kv_heads,
            head_dim,
            segment_count,
            q_strides[0],
            q_strides[1],
            k_strides[0],
            k_strides[1],
            v_strides[0],
            v_strides[1],
            scale,
            window,
            softcap,
            at(sinks),
            at(bias),
            positions};
}

TreeAttentionBackward tree_attention_backward_params(const TreeAttention& forward, Pointer grad, Pointer dq, Pointer dk,
                                                     Pointer dv, Pointer stats, int64_t kv_rows, Strides grad_strides,
                                                     int64_t frozen) {
    return {forward, at(grad), at(dq), at(dk), at(dv), at(stats), kv_rows, grad_strides[0], grad_strides[1], frozen};
}

RestoreRows restore_rows_params(Pointer hidden, Pointer rows, Pointer source, Pointer source_rows, int hidden_dtype,
                                int source_dtype, int64_t count, int64_t width, int64_t hidden_stride,
                                int64_t source_stride, bool add) {
    return {at(hidden),
            at<const int64_t>(rows),
            at(source),
            at<const int64_t>(source_rows),
            static_cast<DType>(hidden_dtype),
            static_cast<DType>(source_dtype),
            count,
            width,
            hidden_stride,
            source_stride,
            add};
}

LowRankRows low_rank_rows_params(Pointer y, Pointer x, Pointer left, Pointer right, Pointer index, int dtype,
                                 int factor_dtype, int64_t rows, int64_t edits, int64_t d_out, int64_t d_in,
                                 int64_t rank, int64_t y_stride, int64_t x_stride, std::array<int64_t, 3> left_strides,
                                 std::array<int64_t, 3> right_strides) {
    return {at(y),
            at(x),
            at(left),
            at(right),
            at<const int64_t>(index),
            static_cast<DType>(dtype),
            static_cast<DType>(factor_dtype),
            rows,
            edits,
            d_out,
            d_in,
            rank,
            y_stride,
            x_stride,
            {left_strides[0], left_strides[1], left_strides[2]},
            {right_strides[0], right_strides[1], right_strides[2]}};
}

TargetLogprob target_logprob_params(Pointer hidden, Pointer weight, Pointer bias, Pointer targets, Pointer out,
                                    int dtype, int64_t rows, int64_t width, int64_t vocab, int64_t count,
                                    int64_t hidden_stride, int64_t weight_stride, double softcap) {
    return {at(hidden),    at(weight),
            at(bias),      at<const int64_t>(targets),
            at(out),       static_cast<DType>(dtype),
            rows,          width,
            vocab,         count,
            hidden_stride, weight_stride,
            softcap};
}

MomentUpdate moment_update_params(Pointer acc, Pointer x, Pointer mask, int acc_dtype, int x_dtype, int64_t rows,
                                  int64_t width, int64_t acc_stride, int64_t x_stride, int64_t sum_rows) {
    return {at(acc),
            at(x),
            at<const bool>(mask),
            static_cast<DType>(acc_dtype),
            static_cast<DType>(x_dtype),
            rows,
            width,
            acc_stride,
            x_stride,
            sum_rows};
}

Null null_params(Pointer x, Pointer out, int dtype, int64_t rows, int64_t width, int64_t x_stride) {
    return {at(x), at(out), static_cast<DType>(dtype), rows, width, x_stride};
}

std::vector<std::string> cuda_archs() {
#ifdef KNOWEDIT_CUDA_ARCHS
    return {KNOWEDIT_CUDA_ARCHS};
#else
    return {};
#endif
}

}  // namespace
}  // namespace knowedit

using namespace knowedit;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native bodies of the ops. Trusts its arguments: call through knowedit_ext.ops.";
    m.attr("version") = KNOWEDIT_VERSION;
    m.attr("sources") = KNOWEDIT_SOURCES;  // their digest: see CMakeLists.txt
    m.def("cpu_isas", &cpu_isas, "Instruction sets usable on this machine, best first.");
    m.def("cpu_isa", &cpu_isa, "The instruction set in use.");
    m.def("use_cpu_isa", &use_cpu_isa, "name"_a, "Choose one of cpu_isas().");
    m.def("cuda_archs", &cuda_archs, "CUDA architectures this module holds code for; empty without CUDA.");

    py::class_<TreeAttention>(m, "TreeAttention")
        .def(py::init(&tree_attention_params), py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "segments"_a, "dtype"_a,
             "rows"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "segment_count"_a, "q_strides"_a, "k_strides"_a,
             "v_strides"_a, "scale"_a, "window"_a, "softcap"_a, "sinks"_a = 0, "bias"_a = 0, "positions"_a = 0);
    py::class_<TreeAttentionBackward>(m, "TreeAttentionBackward")
        .def(py::init(&tree_attention_backward_params), py::kw_only(), "forward"_a, "grad"_a, "dq"_a, "dk"_a, "dv"_a,
             "stats"_a, "kv_rows"_a, "grad_strides"_a, "frozen"_a = 0);
    py::class_<RestoreRows>(m, "RestoreRows")
        .def(py::init(&restore_rows_params), py::kw_only(), "hidden"_a, "rows"_a, "source"_a, "source_rows"_a,
             "hidden_dtype"_a, "source_dtype"_a, "count"_a, "width"_a, "hidden_stride"_a, "source_stride"_a, "add"_a);
    py::class_<LowRankRows>(m, "LowRankRows")
        .def(py::init(&low_rank_rows_params), py::kw_only(), "y"_a, "x"_a, "left"_a, "right"_a, "index"_a, "dtype"_a,
             "factor_dtype"_a, "rows"_a, "edits"_a, "d_out"_a, "d_in"_a, "rank"_a, "y_stride"_a, "x_stride"_a,
             "left_strides"_a, "right_strides"_a);

    py::class_<TargetLogprob>(m, "TargetLogprob")
        .def(py::init(&target_logprob_params), py::kw_only(), "hidden"_a, "weight"_a, "bias"_a, "targets"_a, "out"_a,
             "dtype"_a, "rows"_a, "width"_a, "vocab"_a, "count"_a, "hidden_stride"_a, "weight_stride"_a, "softcap"_a);
    py::class_<MomentUpdate>(m, "MomentUpdate")
        .def(py::init(&moment_update_params), py::kw_only(), "acc"_a, "x"_a, "mask"_a, "acc_dtype"_a, "x_dtype"_a,
             "rows"_a, "width"_a, "acc_stride"_a, "x_stride"_a, "sum_rows"_a);

    py::class_<Null>(m, "Null").def(py::init(&null_params), py::kw_only(), "x"_a, "out"_a, "dtype"_a, "rows"_a,
                                    "width"_a, "x_stride"_a);

    using Released = py::call_guard<py::gil_scoped_release>;
    m.def("tree_attention_cpu", &tree_attention_cpu, "params"_a, "threads"_a, Released());
    m.def("tree_attention_backward_cpu", &tree_attention_backward_cpu, "params"_a, "threads"_a, Released());
    m.def("restore_rows_cpu", &restore_rows_cpu, "params"_a, "threads"_a, Released());
    m.def("null_cpu", &null_cpu, "params"_a, "threads"_a, Released());
    m.def("low_rank_rows_cpu", &low_rank_rows_cpu, "params"_a, "threads"_a, Released());
#ifdef KNOWEDIT_CUDA_ARCHS
    m.def(
        "tree_attention_cuda",
        [](const TreeAttention& params, Pointer owner, int device, Pointer stream) {
            tree_attention_cuda(params, at<int32_t>(owner), device, at(stream));
        },
        "params"_a, "owner"_a, "device"_a, "stream"_a, Released());
    m.def(
        "tree_attention_backward_cuda",
        [](const TreeAttentionBackward& params, Pointer owner, int device, Pointer stream) {
            tree_attention_backward_cuda(params, at<int32_t>(owner), device, at(stream));
        },
        "params"_a, "owner"_a, "device"_a, "stream"_a, Released());
    m.def(
        "restore_rows_cuda",
        [](const RestoreRows& params, int device, Pointer stream) { restore_rows_cuda(params, device, at(stream)); },
        "params"_a, "device"_a, "stream"_a, Released());
    m.def(
        "null_cuda", [](const Null& params, int device, Pointer stream) { null_cuda(params, device, at(stream)); },
        "params"_a, "device"_a, "stream"_a, Released());
    m.def("target_logprob_pieces", &target_logprob_pieces, "rows"_a, "vocab"_a);
    m.def(
        "target_logprob_cuda",
        [](const TargetLogprob& params, Pointer parts, int64_t pieces, int device, Pointer stream) {
            target_logprob_cuda(params, at(parts), pieces, device, at(stream));
        },
        "params"_a, "parts"_a, "pieces"_a, "device"_a, "stream"_a, Released());
    m.def(
        "moment_update_cuda",
        [](const MomentUpdate& params, int device, Pointer stream) { moment_update_cuda(params, device, at(stream)); },
        "params"_a, "device"_a, "stream"_a, Released());
    m.def("moment_update_has_wgmma", &moment_update_has_wgmma, "params"_a, "device"_a);
    m.def(
        "moment_update_wgmma_cuda",
        [](const MomentUpdate& params, bool in_pairs, int device, Pointer stream) {
            moment_update_wgmma_cuda(params, in_pairs, device, at(stream));
        },
        "params"_a, "in_pairs"_a, "device"_a, "stream"_a, Released());
    m.def(
        "low_rank_rows_cuda",
        [](const LowRankRows& params, int device, Pointer stream) { low_rank_rows_cuda(params, device, at(stream)); },
        "params"_a, "device"_a, "stream"_a, Released());
    m.def(
        "cholesky_cuda",
        [](Pointer a, int dtype, int64_t width, int64_t stride, Pointer failure, int device, Pointer stream) {
            cholesky_cuda({at(a), static_cast<DType>(dtype), width, stride, at<CholeskyFailure>(failure)}, device,
                          at(stream));
        },
        "a"_a, "dtype"_a, "width"_a, "stride"_a, "failure"_a, "device"_a, "stream"_a, Released());
#endif
}
