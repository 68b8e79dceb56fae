// The blocked Cholesky factorisation: L L^T against the matrix, and matrices that have no factor.
#include "knowedit/cholesky.h"
#include "simt.h"
#include "strided.h"

using namespace knowedit;
using cases::require;

namespace {

// X X^T / samples over `samples` columns: positive definite from samples >= width on.
template <typename T = double>
cases::Strided<T> moment(int64_t width, int64_t samples, int64_t pad, int64_t offset) {
    std::mt19937 random(static_cast<unsigned>(width));
    const std::vector<double> x = cases::normal<double>(width * samples, random);
    cases::Strided<T> a(width, width, pad, offset);
    for (int64_t r = 0; r < width; ++r)
        for (int64_t c = 0; c <= r; ++c) {
            double sum = 0;
            for (int64_t i = 0; i < samples; ++i) sum += x[r * samples + i] * x[c * samples + i];
            a.at(r, c) = static_cast<T>(sum / static_cast<double>(samples));
        }
    return a;
}

template <typename T>
CholeskyFailure factor(cases::Strided<T>& a) {
    CholeskyFailure failure{-1, 0};
    cholesky_cuda({a.data(), cases::dtype<T>(), a.width, a.stride, &failure}, 0, nullptr);
    return failure;
}

// L L^T - A on and below the diagonal.
template <typename T>
std::vector<double> errors(cases::Strided<T>& lower, cases::Strided<T>& a) {
    std::vector<double> out;
    for (int64_t r = 0; r < a.width; ++r)
        for (int64_t c = 0; c <= r; ++c) {
            double sum = 0;
            for (int64_t k = 0; k <= c; ++k) sum += lower.value(r, k) * lower.value(c, k);
            out.push_back(sum - a.value(r, c));
        }
    return out;
}

double root_mean_square(const std::vector<double>& numbers) {
    double sum = 0;
    for (double x : numbers) sum += x * x;
    return std::sqrt(sum / static_cast<double>(numbers.size()));
}

// The factorisation in float by its definition.
void plain_factor(cases::Strided<float>& a) {
    for (int64_t c = 0; c < a.width; ++c)
        for (int64_t r = c; r < a.width; ++r) {
            float sum = a.at(r, c);
            for (int64_t k = 0; k < c; ++k) sum -= a.at(r, k) * a.at(c, k);
            a.at(r, c) = r == c ? std::sqrt(sum) : sum / a.at(c, c);
        }
}

// double: to rounding; float: no worse than twice the loop in float.
template <typename T = double>
void check(int64_t width, int64_t pad = 0, int64_t offset = 0) {
    auto a = moment<T>(width, 2 * width, pad, offset);
    auto before = a;
    require(factor(a).order == 0, "a factor of ", width);
    for (int64_t r = 0; r < width; ++r)
        for (int64_t c = r + 1; c < width; ++c)
            require(std::isnan(a.at(r, c)), "wrote above the diagonal at ", r, ", ", c);
    const std::vector<double> found = errors(a, before);
    if constexpr (std::is_same_v<T, double>) {
        cases::require_close(found, std::vector<double>(found.size()), 1e-14, "L L^T - A");
    } else {
        auto plain = before;
        plain_factor(plain);
        const double error = root_mean_square(found), of_plain = root_mean_square(errors(plain, before));
        require(error <= std::max(2 * of_plain, cases::epsilon<float>()), "width ", width, ": error ", error,
                ", by the loop ", of_plain);
    }
}

}  // namespace

KNOWEDIT_CASE(cholesky_smallest) { check(1), check(2, 3, 1); }
KNOWEDIT_CASE(cholesky_one_block) { check(64), check(37, 1); }
KNOWEDIT_CASE(cholesky_two_blocks) { check(65), check(100, 3, 1); }
KNOWEDIT_CASE(cholesky_two_panels) {
    if (seed < 2) check(256 + 130, 2);
}
KNOWEDIT_CASE(cholesky_of_floats) {
    check<float>(1), check<float>(2, 3, 1), check<float>(64, 4), check<float>(65), check<float>(200, 3, 1);
    if (seed < 1) check<float>(256 + 130, 2);
}

KNOWEDIT_CASE(cholesky_names_the_first_bad_minor) {
    for (int64_t bad : {0, 5, 63, 64, 99}) {
        auto a = moment(100, 200, 0, 0);
        a.at(bad, bad) = -3;
        const CholeskyFailure failure = factor(a);
        require(failure.order == bad + 1, "minor ", bad + 1, " was reported as ", failure.order);
        require(failure.pivot <= -3, "pivot ", failure.pivot);
    }
    auto single = moment<float>(100, 200, 0, 0);
    single.at(70, 70) = -3;
    const CholeskyFailure of_single = factor(single);
    require(of_single.order == 71 && of_single.pivot <= -3, "the minor of a float matrix");
    auto a = moment(70, 140, 0, 0);
    a.at(66, 3) = NAN;
    require(factor(a).order == 67, "NaN is not positive");
    auto few = moment(80, 40, 0, 0);  // rank 40: by rounding some minor from 41 on may fail, none before
    const int64_t order = factor(few).order;
    require(order == 0 || order > 40, "rank 40 fails at ", order);
}

KNOWEDIT_CASE(cholesky_rows_beyond_32_bits) {
    cases::FarApart<double> a(2);
    a.at(0, 0) = 4, a.at(1, 0) = 2, a.at(1, 1) = 10;
    CholeskyFailure failure{-1, 0};
    cholesky_cuda({a.data(), DType::Float64, 2, a.kStride, &failure}, 0, nullptr);
    require(failure.order == 0 && a.at(0, 0) == 2 && a.at(1, 0) == 1 && a.at(1, 1) == 3, "a factor of rows far apart");
}

KNOWEDIT_CASE(cholesky_refuses_halves) {
    CholeskyFailure failure{};
    cases::require_contains(
        cases::error_of([&] { cholesky_cuda({nullptr, DType::BFloat16, 0, 0, &failure}, 0, nullptr); }),
        "cholesky on CUDA: matrices are");
}

KNOWEDIT_CASE(cholesky_launches) {
    auto a = moment(300, 300, 0, 0);
    factor(a);
    // A fill; 5 blocks, rows below 4 of them, the rest of the panel 3 times, the triangle behind it.
    require(simt::launches().size() == 1 + 5 + 4 + 3 + 1, simt::launches().size(), " launches");
    CholeskyFailure failure{7, 0};
    cholesky_cuda({nullptr, DType::Float64, 0, 0, &failure}, 0, nullptr);
    require(failure.order == 0, "an empty matrix has a factor");
}
