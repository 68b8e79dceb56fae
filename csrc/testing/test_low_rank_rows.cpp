// low_rank_rows' kernel against a loop in double.
#include "knowedit/low_rank_rows.h"
#include "strided.h"

using namespace knowedit;
using cases::require;

namespace {

struct Problem {
    int64_t d_in, d_out, rank;
    bool rank_innermost = false;
};

constexpr int64_t kEdits = 3;
const std::vector<int64_t> kIndex = {2, -1, 0, 0, kEdits, 1, -2, 2};

// [edits, width, rank] with stride 1 along one of the two.
FactorStrides strides(int64_t width, int64_t rank, bool rank_innermost) {
    return rank_innermost ? FactorStrides{width * rank, rank, 1} : FactorStrides{width * rank, 1, width};
}

template <typename T, typename F>
void check(const Problem& s) {
    std::mt19937 random(static_cast<unsigned>(s.d_in * 100 + s.rank));
    const auto rows = static_cast<int64_t>(kIndex.size());
    cases::Strided<T> y(rows, s.d_out, 3, 1), x(rows, s.d_in, 2);
    y.fill(random), x.fill(random, 1 / std::sqrt(double(s.d_in)));
    const auto left = cases::normal<F>(kEdits * s.d_out * s.rank, random);
    const auto right = cases::normal<F>(kEdits * s.d_in * s.rank, random);
    const FactorStrides l = strides(s.d_out, s.rank, s.rank_innermost), r = strides(s.d_in, s.rank, !s.rank_innermost);

    std::vector<double> truth;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < s.d_out; ++o) {
            double sum = y.value(row, o);
            const int64_t edit = kIndex[row];
            for (int64_t k = 0; k < s.rank && edit >= 0 && edit < kEdits; ++k) {
                double inner = 0;
                for (int64_t i = 0; i < s.d_in; ++i)
                    inner += cases::value(right[edit * r.edit + i * r.width + k * r.rank]) * x.value(row, i);
                sum += cases::value(left[edit * l.edit + o * l.width + k * l.rank]) * inner;
            }
            truth.push_back(sum);
        }
    low_rank_rows_cuda({y.data(), x.data(), left.data(), right.data(), kIndex.data(), cases::dtype<T>(),
                        cases::dtype<F>(), rows, kEdits, s.d_out, s.d_in, s.rank, y.stride, x.stride, l, r},
                       0, nullptr);
    std::vector<T> got;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < s.d_out; ++o) {
            const bool no_such_edit = kIndex[row] < -1 || kIndex[row] >= kEdits;
            require(std::isnan(y.value(row, o)) == no_such_edit, "row ", row, " is ", y.value(row, o));
            if (no_such_edit) narrow(truth[got.size()], &y.at(row, o));
            got.push_back(y.at(row, o));
        }
    const double sums = std::is_same_v<T, double> ? 1e-14 : 1e-6;
    cases::require_close(got, truth, cases::epsilon<T>() + sums, "y", 2 + s.rank);
}

void check_all(const Problem& problem) {
    check<float, float>(problem);
    check<double, double>(problem);
    check<double, float>(problem);
    check<BFloat16, BFloat16>(problem);
    check<BFloat16, float>(problem);
    check<Float16, Float16>(problem);
    check<Float16, float>(problem);
}

}  // namespace

KNOWEDIT_CASE(low_rank_rows_smallest) { check_all({1, 1, 1}); }
KNOWEDIT_CASE(low_rank_rows_one_rank) { check_all({37, 21, 1}); }
KNOWEDIT_CASE(low_rank_rows_more_ranks_than_fit_at_once) { check_all({300, 13, 9, true}); }
KNOWEDIT_CASE(low_rank_rows_wider_than_a_block) { check_all({7, 519, 4}); }

KNOWEDIT_CASE(low_rank_rows_beyond_32_bits) {
    cases::FarApart<float> y(2), x(2), left(2), right(2);
    const int64_t index[2] = {1, 1}, stride = y.kStride;
    y.at(1, 0) = 1, x.at(1, 0) = 2, left.at(1, 0) = 3, right.at(1, 0) = 5;
    low_rank_rows_cuda({y.data(),
                        x.data(),
                        left.data(),
                        right.data(),
                        index,
                        DType::Float32,
                        DType::Float32,
                        2,
                        2,
                        1,
                        1,
                        1,
                        stride,
                        stride,
                        {stride, 1, 1},
                        {stride, 1, 1}},
                       0, nullptr);
    require(y.at(0, 0) == 0 && y.at(1, 0) == 31, "rows far apart");
}

KNOWEDIT_CASE(low_rank_rows_nothing_to_do) {
    float y[1] = {5}, x[1] = {1};
    const int64_t index[1] = {0};
    low_rank_rows_cuda({y, x, nullptr, nullptr, index, DType::Float32, DType::Float32, 1, 1, 1, 1, 0, 1, 1, {}, {}}, 0,
                       nullptr);
    require(y[0] == 5, "rank 0 changes nothing");
}
