// null's kernel: every value where it was, nothing beyond it.
#include "cases.h"
#include "knowedit/null.h"
#include "simt.h"

using namespace knowedit;

namespace {

template <typename T>
void check(int64_t rows, int64_t width) {
    std::mt19937 random(static_cast<unsigned>(rows * 8 + width));
    const int64_t stride = width + 3;
    const auto x = cases::normal<T>((rows - 1) * stride + width, random);
    std::vector<T> out(rows * width);
    null_cuda({x.data(), out.data(), cases::dtype<T>(), rows, width, stride}, 1, &random);
    std::vector<double> truth;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c) truth.push_back(cases::value(x[r * stride + c]));
    cases::require_close(out, truth, 0, "a copy", 0);
    for (const simt::Launch& launch : simt::launches()) cases::require(launch.stream == &random && launch.device == 1);
}

template <typename T>
void check_shapes() {
    for (const int64_t rows : {1, 3})
        for (const int64_t width : {1, 7, 300}) check<T>(rows, width);
}

}  // namespace

KNOWEDIT_CASE(null_copies) {
    check_shapes<float>(), check_shapes<double>(), check_shapes<BFloat16>(), check_shapes<Float16>();
}

KNOWEDIT_CASE(null_of_nothing) {
    null_cuda({}, 0, nullptr);
    cases::require(simt::launches().empty(), "nothing to do, nothing launched");
}
