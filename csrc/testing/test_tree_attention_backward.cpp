// tree_attention_backward's kernels against the loop in double.
#include "simt.h"
#include "trees.h"

using namespace knowedit;

namespace {

template <typename T>
struct Found {
    std::vector<T> q, k, v;
};

template <typename T>
Found<T> differentiate(const cases::Problem<T>& problem, const std::vector<T>& up, int64_t frozen = 0) {
    using Stat = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const int64_t kv = problem.tree.kv_rows * problem.shape.kv_heads * problem.shape.head_dim;
    Found<T> to{cases::unwritten<T>(up.size()), cases::unwritten<T>(kv), cases::unwritten<T>(kv)};
    std::vector<int32_t> owner(problem.tree.rows + 2 * ((problem.tree.kv_rows + 7) / 8), 77);
    auto stats = cases::unwritten<Stat>(problem.tree.rows * problem.shape.heads * 2);
    const int64_t d = problem.shape.head_dim, heads = problem.shape.heads;
    const TreeAttentionBackward backward{
        problem.params,       up.data(), to.q.data(), to.k.data(), to.v.data(), stats.data(),
        problem.tree.kv_rows, heads * d, d,           frozen};
    tree_attention_backward_cuda(backward, owner.data(), 1, &owner);
    for (const simt::Launch& launch : simt::launches()) cases::require(launch.stream == &owner && launch.device == 1);
    simt::launches().clear();
    return to;
}

template <typename T>
void check(uint64_t seed) {
    // Where races are looked for, and in other orders of threads, one type stands for all.
    if ((cases::kRaces || seed) && !std::is_same_v<T, float>) return;
    cases::for_each_problem([](const cases::Tree& tree, const cases::Shape& shape, std::mt19937& random) {
        const cases::Problem<T> problem(tree, shape, random);
        const auto up = cases::normal<T>(tree.rows * shape.heads * shape.head_dim, random);
        const Found<T> found = differentiate(problem, up);
        const auto truth = problem.gradients(up);
        const double tolerance = 60 * cases::epsilon<T>();
        cases::require_near(found.q, truth.q, tolerance, "dq");
        cases::require_near(found.k, truth.k, tolerance, "dk");
        cases::require_near(found.v, truth.v, tolerance, "dv");
    });
}

}  // namespace

KNOWEDIT_CASE(tree_attention_backward_float) { check<float>(seed); }
KNOWEDIT_CASE(tree_attention_backward_double) { check<double>(seed); }
KNOWEDIT_CASE(tree_attention_backward_bfloat16) { check<BFloat16>(seed); }
KNOWEDIT_CASE(tree_attention_backward_half) { check<Float16>(seed); }

KNOWEDIT_CASE(tree_attention_backward_of_frozen_rows_is_zero) {
    std::mt19937 random(7);
    const cases::Problem<float> problem(cases::random_tree(random, 12, 6), {4, 2, 24}, random);
    const auto up = cases::normal<float>(problem.tree.rows * 4 * 24, random);
    const Found<float> whole = differentiate(problem, up);
    const int64_t row = 2 * 24;
    for (int64_t frozen : {int64_t{1}, int64_t{8}, int64_t{13}, problem.tree.kv_rows}) {
        const Found<float> found = differentiate(problem, up, std::min(frozen, problem.tree.kv_rows));
        cases::require(found.q == whole.q, "dq beside frozen rows");
        for (size_t i = 0; i < whole.k.size(); ++i) {
            const bool live = static_cast<int64_t>(i) >= frozen * row;
            cases::require(found.k[i] == (live ? whole.k[i] : 0) && found.v[i] == (live ? whole.v[i] : 0), "number ", i,
                           " with ", frozen, " frozen rows");
        }
    }
}

KNOWEDIT_CASE(tree_attention_backward_is_the_same_in_any_order) {
    std::mt19937 random(5);
    const cases::Problem<float> problem(cases::random_tree(random, 12, 6), {4, 2, 40}, random);
    const auto up = cases::normal<float>(problem.tree.rows * 4 * 40, random);
    simt::set_seed(0);
    const Found<float> first = differentiate(problem, up);
    simt::set_seed(seed + 100);
    const Found<float> second = differentiate(problem, up);
    cases::require(first.q == second.q && first.k == second.k && first.v == second.v);
}

KNOWEDIT_CASE(tree_attention_backward_without_rows) {
    std::mt19937 random(5);
    const cases::Problem<float> problem({{{-1, 0, 0, 3, -1}}, 0, 3}, {2, 1, 4}, random);
    const Found<float> found = differentiate(problem, {});
    for (float x : found.k) cases::require(x == 0, "dk of keys that nobody sees");
}
