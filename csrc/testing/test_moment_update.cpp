// moment_update's kernels against a loop in double, and the order of the triangle's tiles.
#include <memory>

#include "knowedit/moment_update.h"
#include "knowedit/triangle.h"
#include "strided.h"

using namespace knowedit;
using cases::require;

namespace {

struct Problem {
    int64_t rows, width;
    int64_t pad = 0, offset = 0;
    bool masked = false;
    int64_t sum_rows = 4096;
};

// Sums are of `rows` products of about 1, so the tolerance is relative to that.
template <typename T, typename Acc>
void check(const Problem& s, double tolerance) {
    std::mt19937 random(static_cast<unsigned>(s.rows * 1000 + s.width));
    cases::Strided<T> x(s.rows, s.width, s.pad, s.offset);
    cases::Strided<Acc> acc(s.width, s.width, 3, 1);
    x.fill(random);
    const auto mask = std::make_unique<bool[]>(s.rows);
    for (int64_t r = 0; r < s.rows; ++r) {
        mask[r] = !s.masked || random() % 5 < 3;
        if (!mask[r]) narrow(static_cast<float>(NAN), &x.at(r, 0));
    }
    for (int64_t r = 0; r < s.width; ++r)
        for (int64_t c = 0; c <= r; ++c) acc.at(r, c) = 1;  // NaN above the diagonal
    moment_update_cuda({acc.data(), x.data(), s.masked ? mask.get() : nullptr, cases::dtype<Acc>(), cases::dtype<T>(),
                        s.rows, s.width, acc.stride, x.stride, s.sum_rows},
                       0, nullptr);

    std::vector<Acc> got;
    std::vector<double> truth;
    for (int64_t r = 0; r < s.width; ++r)
        for (int64_t c = 0; c < s.width; ++c) {
            if (c > r) {
                require(std::isnan(acc.at(r, c)), "wrote above the diagonal at ", r, ", ", c);
                continue;
            }
            got.push_back(acc.at(r, c)), truth.push_back(1);
            for (int64_t i = 0; i < s.rows; ++i)
                if (mask[i]) truth.back() += x.value(i, r) * x.value(i, c);
        }
    cases::require_close(got, truth, tolerance, "acc", static_cast<double>(s.rows));
}

void check_all(const Problem& problem) {
    check<BFloat16, double>(problem, 5e-7);
    check<Float16, float>(problem, 5e-7);
    check<float, double>(problem, 1e-7);
}

}  // namespace

KNOWEDIT_CASE(moment_update_smallest) {
    check_all({1, 1});
    check<float, float>({1, 1}, 1e-7);
}
KNOWEDIT_CASE(moment_update_three_tiles) { check_all({33, 130, 6, 8}); }
KNOWEDIT_CASE(moment_update_several_steps) { check_all({101, 24, 8}); }
KNOWEDIT_CASE(moment_update_masked) { check_all({40, 16, 0, 0, true}); }
KNOWEDIT_CASE(moment_update_unaligned) { check_all({19, 13, 0, 1, true}); }
KNOWEDIT_CASE(moment_update_float_sums) { check<float, float>({20, 131, 1}, 2e-7); }

// Ones: 2^24 + 1 is no float, so a sum that stayed in float would lose the last rows.
KNOWEDIT_CASE(moment_update_sums_reach_a_double_acc) {
    constexpr int64_t rows = 100;
    std::vector<BFloat16> half(rows);
    std::vector<float> whole(rows);
    for (int64_t r = 0; r < rows; ++r) narrow(r < 64 ? 4096.0f : 1.0f, &half[r]), whole[r] = r < 64 ? 4096.0f : 1.0f;
    for (int64_t sum_rows : {1, 64}) {
        double of_half = 0, of_whole = 0;
        moment_update_cuda({&of_half, half.data(), nullptr, DType::Float64, DType::BFloat16, rows, 1, 1, 1, sum_rows},
                           0, nullptr);
        moment_update_cuda({&of_whole, whole.data(), nullptr, DType::Float64, DType::Float32, rows, 1, 1, 1, sum_rows},
                           0, nullptr);
        require(of_half == 64.0 * 4096 * 4096 + 36, "sum of bfloat16 rows: ", of_half);
        require(of_whole == 64.0 * 4096 * 4096 + 36, "sum of float32 rows: ", of_whole);
    }
}

// The split into three bfloat16 numbers costs nothing: the error is that of sums in float, or less.
KNOWEDIT_CASE(moment_update_of_floats_is_as_exact_as_in_float) {
    for (int64_t rows : {1, 5, 300}) {
        constexpr int64_t width = 20;
        std::mt19937 random(static_cast<unsigned>(rows));
        cases::Strided<float> x(rows, width);
        x.fill(random);
        std::vector<double> acc(width * width);
        moment_update_cuda(
            {acc.data(), x.data(), nullptr, DType::Float64, DType::Float32, rows, width, width, x.stride, 4096}, 0,
            nullptr);
        double error = 0, plain_error = 0;
        for (int64_t r = 0; r < width; ++r)
            for (int64_t c = 0; c <= r; ++c) {
                double truth = 0;
                float plain = 0;
                for (int64_t i = 0; i < rows; ++i)
                    truth += x.value(i, r) * x.value(i, c), plain += x.at(i, r) * x.at(i, c);
                error += std::pow(acc[r * width + c] - truth, 2), plain_error += std::pow(plain - truth, 2);
            }
        require(error <= 4 * plain_error, rows, " rows: error ", std::sqrt(error), ", in float ",
                std::sqrt(plain_error));
    }
}

// What Python asks for: twice the rows before sums go to acc cost no more than the longer sums must.
KNOWEDIT_CASE(moment_update_sums_of_8192_rows) {
    if (seed > 1) return;  // of one tile, whose order the other cases try
    constexpr int64_t rows = 8192 + 40, width = 3;
    std::mt19937 random(3);
    cases::Strided<float> x(rows, width);
    cases::Strided<BFloat16> half(rows, width);
    x.fill(random), half.fill(random);
    const auto error = [&](auto& of, DType dtype, int64_t sum_rows) {
        std::vector<double> acc(width * width);
        moment_update_cuda(
            {acc.data(), of.data(), nullptr, DType::Float64, dtype, rows, width, width, of.stride, sum_rows}, 0,
            nullptr);
        double worst = 0;
        for (int64_t r = 0; r < width; ++r)
            for (int64_t c = 0; c <= r; ++c) {
                double truth = 0;
                for (int64_t i = 0; i < rows; ++i) truth += of.value(i, r) * of.value(i, c);
                worst = std::max(worst, std::abs(acc[r * width + c] - truth) / rows);
            }
        return worst;
    };
    for (int64_t sum_rows : {4096, 8192}) {
        const double whole = error(x, DType::Float32, sum_rows), halves = error(half, DType::BFloat16, sum_rows);
        require(whole < 1e-6 && halves < 2e-5, "sums of ", sum_rows, " rows: ", whole, ", of halves ", halves);
    }
}

KNOWEDIT_CASE(moment_update_rows_beyond_32_bits) {
    cases::FarApart<float> x(3);
    cases::FarApart<double> acc(2);
    for (int64_t r = 0; r < 3; ++r) x.at(r, 0) = 1 + r, x.at(r, 1) = 2;
    moment_update_cuda(
        {acc.data(), x.data(), nullptr, DType::Float64, DType::Float32, 3, 2, acc.kStride, x.kStride, 64}, 0, nullptr);
    require(acc.at(0, 0) == 14 && acc.at(1, 0) == 12 && acc.at(1, 1) == 12, "sums over rows far apart");
    cases::FarApart<BFloat16> half(2);
    for (int64_t r = 0; r < 2; ++r) narrow(3.0f, &half.at(r, 0));
    double sum = 0;
    moment_update_cuda({&sum, half.data(), nullptr, DType::Float64, DType::BFloat16, 2, 1, 1, half.kStride, 64}, 0,
                       nullptr);
    require(sum == 18, "sums over halves far apart");
}

KNOWEDIT_CASE(moment_update_refuses_float64) {
    double x[1] = {};
    cases::require_contains(
        cases::error_of(
            [&] { moment_update_cuda({x, x, nullptr, DType::Float64, DType::Float64, 1, 1, 1, 1, 1}, 0, nullptr); }),
        "moment_update on CUDA: float64");
}

KNOWEDIT_CASE(triangle_tiles_each_once) {
    if (seed) return;  // no kernel
    for (int64_t rows : {1, 2, 15, 16, 17, 33, 50}) {
        std::vector<int> seen(rows * rows);
        for (int64_t i = 0; i < triangle_tiles(rows); ++i) {
            const TilePlace at = triangle_tile(i, rows);
            require(at.column >= 0 && at.column <= at.row && at.row < rows, "tile ", i, " of ", rows, " rows");
            ++seen[at.row * rows + at.column];
        }
        for (int64_t i = 0; i < rows * rows; ++i) require(seen[i] == (i % rows <= i / rows), "place ", i, " of ", rows);
    }
    for (int64_t rows : {int64_t{46341}, int64_t{1} << 26})  // beyond 2^30 and 2^51 tiles
        for (int64_t r : {rows - 17, rows - 1}) {
            require(triangle_row(triangle_tiles(r)) == r, "first tile of row ", r);
            require(triangle_row(triangle_tiles(r + 1) - 1) == r, "last tile of row ", r);
        }
}
