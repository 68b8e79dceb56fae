// The blocked Cholesky factorisation: L L^T against the matrix, and matrices that have no factor.
#include "knowedit/cholesky.h"
#include "simt.h"
#include "strided.h"

using namespace knowedit;
using cases::require;

namespace {

// X X^T / samples over `samples` columns: positive definite from samples >= width on.
cases::Strided<double> moment(int64_t width, int64_t samples, int64_t pad, int64_t offset) {
    std::mt19937 random(static_cast<unsigned>(width));
    const std::vector<double> x = cases::normal<double>(width * samples, random);
    cases::Strided<double> a(width, width, pad, offset);
    for (int64_t r = 0; r < width; ++r)
        for (int64_t c = 0; c <= r; ++c) {
            double sum = 0;
            for (int64_t i = 0; i < samples; ++i) sum += x[r * samples + i] * x[c * samples + i];
            a.at(r, c) = sum / static_cast<double>(samples);
        }
    return a;
}

CholeskyFailure factor(cases::Strided<double>& a) {
    CholeskyFailure failure{-1, 0};
    cholesky_cuda({a.data(), a.width, a.stride, &failure}, 0, nullptr);
    return failure;
}

void check(int64_t width, int64_t pad = 0, int64_t offset = 0) {
    auto a = moment(width, 2 * width, pad, offset);
    const auto before = a;
    require(factor(a).order == 0, "a factor of ", width);
    auto truth = before;
    std::vector<double> got, want;
    for (int64_t r = 0; r < width; ++r)
        for (int64_t c = 0; c < width; ++c) {
            if (c > r) {
                require(std::isnan(a.at(r, c)), "wrote above the diagonal at ", r, ", ", c);
                continue;
            }
            double sum = 0;
            for (int64_t k = 0; k <= c; ++k) sum += a.at(r, k) * a.at(c, k);
            got.push_back(sum), want.push_back(truth.at(r, c));
        }
    cases::require_close(got, want, 1e-14, "L L^T");
}

}  // namespace

KNOWEDIT_CASE(cholesky_smallest) { check(1), check(2, 3, 1); }
KNOWEDIT_CASE(cholesky_one_block) { check(64), check(37, 1); }
KNOWEDIT_CASE(cholesky_two_blocks) { check(65), check(100, 3, 1); }
KNOWEDIT_CASE(cholesky_two_panels) {
    if (seed < 2) check(256 + 130, 2);
}

KNOWEDIT_CASE(cholesky_names_the_first_bad_minor) {
    for (int64_t bad : {0, 5, 63, 64, 99}) {
        auto a = moment(100, 200, 0, 0);
        a.at(bad, bad) = -3;
        const CholeskyFailure failure = factor(a);
        require(failure.order == bad + 1, "minor ", bad + 1, " was reported as ", failure.order);
        require(failure.pivot <= -3, "pivot ", failure.pivot);
    }
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
    cholesky_cuda({a.data(), 2, a.kStride, &failure}, 0, nullptr);
    require(failure.order == 0 && a.at(0, 0) == 2 && a.at(1, 0) == 1 && a.at(1, 1) == 3, "a factor of rows far apart");
}

KNOWEDIT_CASE(cholesky_launches) {
    auto a = moment(300, 300, 0, 0);
    factor(a);
    // A fill; 5 blocks, rows below 4 of them, the rest of the panel 3 times, the triangle behind it.
    require(simt::launches().size() == 1 + 5 + 4 + 3 + 1, simt::launches().size(), " launches");
    CholeskyFailure failure{7, 0};
    cholesky_cuda({nullptr, 0, 0, &failure}, 0, nullptr);
    require(failure.order == 0, "an empty matrix has a factor");
}
