// bfloat16 and float16 as storage: to float exactly, from float with round-to-nearest-even. Plain integer code, so it
// vectorises on every instruction set and needs no compiler extension.
#pragma once

#include <cstdint>
#include <cstring>

namespace knowedit {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    // The exponent is short of 112; a multiplication puts it right, subnormals too.
    const float finite = bits_float(magnitude) * bits_float((254u - 15u) << 23);
    const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
    const bool is_finite = (x.bits & 0x7c00u) != 0x7c00u;
    return bits_float(sign | (is_finite ? float_bits(finite) : special));
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(double x, float* to) { *to = static_cast<float>(x); }
inline void narrow(float x, BFloat16* to) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void narrow(float x, Float16* to) {
    const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal: drop 13 bits, ties to even. Subnormal: let a float addition do the rounding. Too large: infinity.
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    if (magnitude >= 0x477ff000u) half = 0x7c00u;
    if (magnitude > 0x7f800000u) half = 0x7e00u;
    to->bits = static_cast<uint16_t>(sign | half);
}
inline void narrow(double x, BFloat16* to) { narrow(static_cast<float>(x), to); }
inline void narrow(double x, Float16* to) { narrow(static_cast<float>(x), to); }

}  // namespace knowedit
