// tree_attention's kernels against the loop in double.
#include "simt.h"
#include "strided.h"
#include "trees.h"

using namespace knowedit;

namespace {

template <typename T>
std::vector<T> attend(cases::Problem<T>& problem) {
    auto out = cases::unwritten<T>(problem.tree.rows * problem.shape.heads * problem.shape.head_dim);
    std::vector<int32_t> owner(problem.tree.rows, 77);
    problem.params.out = out.data();
    tree_attention_cuda(problem.params, owner.data(), 1, &owner);
    for (const simt::Launch& launch : simt::launches()) cases::require(launch.stream == &owner && launch.device == 1);
    simt::launches().clear();
    return out;
}

template <typename T>
void check(uint64_t seed) {
    // Where races are looked for, and in other orders of threads, one type stands for all.
    if ((cases::kRaces || seed) && !std::is_same_v<T, float>) return;
    cases::for_each_problem([](const cases::Tree& tree, const cases::Shape& shape, std::mt19937& random) {
        cases::Problem<T> problem(tree, shape, random);
        cases::require_near(attend(problem), problem.attention(), 60 * cases::epsilon<T>(), "tree_attention");
    });
}

}  // namespace

KNOWEDIT_CASE(tree_attention_float) { check<float>(seed); }
KNOWEDIT_CASE(tree_attention_double) { check<double>(seed); }
KNOWEDIT_CASE(tree_attention_bfloat16) { check<BFloat16>(seed); }
KNOWEDIT_CASE(tree_attention_half) { check<Float16>(seed); }

KNOWEDIT_CASE(tree_attention_large_scores) {
    std::mt19937 random(3);
    cases::Problem<float> problem({{{0, 0, 0, 6, -1}, {6, 6, 4, 3, 0}}, 9, 9}, {2, 1, 8, 0, 0, 300.0}, random);
    cases::require_close(attend(problem), problem.attention(), 2e-3, "scores in the thousands");
}

KNOWEDIT_CASE(tree_attention_launches) {
    const Segment none{};
    TreeAttention p{};
    int32_t owner = 0;
    tree_attention_cuda(p, &owner, 0, nullptr);
    cases::require(simt::launches().empty(), "no rows, no launch");
    float x = 0;
    p.q = p.k = p.v = p.out = &x, p.segments = &none;
    p.rows = p.heads = p.kv_heads = p.segment_count = 1, p.head_dim = 257;
    const auto error = [&] { return cases::error_of([&] { tree_attention_cuda(p, &owner, 0, nullptr); }); };
    cases::require_contains(error(), "tree_attention on CUDA: head dimension 257 is above 256");
    p.head_dim = 1;
    simt::fail_next_launch(cudaErrorInvalidValue);
    cases::require_contains(error(), "tree_attention on CUDA: invalid argument");
    // Rows are taken in fours: 2^33 do not fit a grid.
    p.rows = int64_t{1} << 33;
    cases::require_contains(error(), "tree_attention on CUDA: 2147483648 blocks are needed");
}

KNOWEDIT_CASE(tree_attention_beyond_32_bit_offsets) {
    cases::FarApart<float> q(2), k(2), v(2);
    const Segment pair{0, 0, 0, 2, -1};
    std::vector<float> out = cases::unwritten<float>(2);
    std::vector<int32_t> owner(2 + 2);  // two rows; the gradients also range over one block of keys
    for (int row = 0; row < 2; ++row) q.at(row, 0) = k.at(row, 0) = 1, v.at(row, 0) = static_cast<float>(4 * row + 2);
    constexpr int64_t stride = cases::FarApart<float>::kStride;
    const TreeAttention p{q.data(), k.data(), v.data(), out.data(), &pair,   DType::Float32, 2, 1,
                          1,        1,        1,        stride,     1,       stride,         1, stride,
                          1,        1.0,      0,        0,          nullptr, nullptr,        0};
    tree_attention_cuda(p, owner.data(), 0, nullptr);
    cases::require(out[0] == 2 && out[1] == 4, "rows far apart");
    std::vector<float> up(2, 1), dq = cases::unwritten<float>(2), dk = dq, dv = dq, stats(4);
    tree_attention_backward_cuda({p, up.data(), dq.data(), dk.data(), dv.data(), stats.data(), 2, 1, 1}, owner.data(),
                                 0, nullptr);
    cases::require(dv[0] == 1.5f && dv[1] == 0.5f, "gradients of rows far apart");
}
