// Cases that run_kernels runs, and what they share: data, NaN-filled outputs, comparison with a float64 reference.
//
// A case's body runs once for each seed of the scheduler (set before, and known in it as `seed`). One whose name begins
// with "broken_" runs only when named: it holds a mistake that has to be found.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/half.h"
#include "knowedit/dtype.h"

namespace cases {

#ifdef SIMT_RACES
constexpr bool kRaces = true;  // this build looks for races, and is slow
#else
constexpr bool kRaces = false;
#endif

struct Case {
    std::string file;
    const char* name;
    void (*body)(uint64_t seed);
};
inline std::vector<Case>& all() {
    static std::vector<Case> list;
    return list;
}
struct Registered {
    Registered(const char* file, const char* name, void (*body)(uint64_t seed)) { all().push_back({file, name, body}); }
};
#define KNOWEDIT_CASE(name)                                            \
    static void name(uint64_t seed);                                   \
    static const cases::Registered name##_case(__FILE__, #name, name); \
    static void name([[maybe_unused]] uint64_t seed)

// Throws with all the parts in one message.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    ((message << "") << ... << parts);
    throw std::runtime_error(message.str());
}
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

// The message of what `call` throws.
template <typename F>
std::string error_of(F call) {
    try {
        call();
    } catch (const std::exception& error) {
        return error.what();
    }
    return "no error";
}
inline void require_contains(const std::string& text, const std::string& part) {
    require(text.find(part) != std::string::npos, "'", part, "' is not in: ", text);
}

// ---- data; every vector is its own allocation of the exact size, so that reads and writes outside are seen ----

template <typename T>
std::vector<T> unwritten(size_t count) {  // NaN
    std::vector<T> out(count);
    if (count) std::memset(static_cast<void*>(out.data()), 0xff, count * sizeof(T));
    return out;
}

template <typename T>
double value(T x) {
    return static_cast<double>(knowedit::widen(x));
}

template <typename T>
std::vector<T> normal(size_t count, std::mt19937& random, double scale = 1) {
    std::normal_distribution<double> draw(0, scale);
    std::vector<T> out(count);
    for (T& x : out) knowedit::narrow(draw(random), &x);
    return out;
}

template <typename T>
std::vector<double> wide(const std::vector<T>& from) {
    std::vector<double> out;
    for (T x : from) out.push_back(value(x));
    return out;
}

template <typename T>
constexpr double epsilon() {  // of one rounding, relative
    if constexpr (std::is_same_v<T, double>) return 1.2e-16;
    if constexpr (std::is_same_v<T, float>) return 6e-8;
    if constexpr (std::is_same_v<T, knowedit::Float16>) return 5e-4;
    return 4e-3;
}

template <typename T>
constexpr knowedit::DType dtype() {
    if constexpr (std::is_same_v<T, double>) return knowedit::DType::Float64;
    if constexpr (std::is_same_v<T, float>) return knowedit::DType::Float32;
    if constexpr (std::is_same_v<T, knowedit::Float16>) return knowedit::DType::Float16;
    return knowedit::DType::BFloat16;
}

// |got - truth| <= tolerance * (|truth| + scale) everywhere; NaN nowhere.
template <typename T>
void require_close(const std::vector<T>& got, const std::vector<double>& truth, double tolerance,
                   const std::string& what, double scale = 1) {
    require(got.size() == truth.size(), what, ": ", got.size(), " elements, not ", truth.size());
    for (size_t i = 0; i < got.size(); ++i)
        if (!(std::abs(value(got[i]) - truth[i]) <= tolerance * (std::abs(truth[i]) + scale)))
            fail(what, ": element ", i, " is ", value(got[i]), ", not ", truth[i]);
}

// Calls test(T{}) for every element type.
template <typename F>
void for_each_dtype(F test) {
    test(float{});
    test(double{});
    test(knowedit::BFloat16{});
    test(knowedit::Float16{});
}

}  // namespace cases
