// The products of cuda/mma.cuh, one multiplication after another. Built without sanitizers, as simt.cpp is.
#include "../cuda/mma.cuh"

namespace knowedit::simt_mma {
namespace {

using All = simt::Lanes<Operands>;

template <typename T>
float half_of(uint32_t pair, int upper) {
    T x;
    x.bits = static_cast<uint16_t>(pair >> (16 * upper));
    return widen(x);
}

// c[i] of a 16x8 tile += sum over k of A(row, k) B(k, column).
template <int depth, typename A, typename B>
void add(float (&c)[4], A a, B b) {
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    float left[2][depth], right[2][depth];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < depth; ++k) left[i][k] = a(g + 8 * i, k), right[i][k] = b(k, 2 * t + i);
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < depth; ++k) c[i] += left[i / 2][k] * right[i % 2][k];
}

template <typename T>
void add_half(float (&c)[4], const All& all) {
    add<16>(
        c, [&](int row, int k) { return half_of<T>(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2); },
        [&](int k, int column) { return half_of<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2); });
}

float tf32_of(uint32_t bits) { return bits_float(bits & ~0x1fffu); }

}  // namespace

void add_bfloat16(float (&c)[4], const All& all) { add_half<__nv_bfloat16>(c, all); }
void add_float16(float (&c)[4], const All& all) { add_half<__half>(c, all); }

void add_tf32(float (&c)[4], const All& all) {
    add<8>(
        c, [&](int row, int k) { return tf32_of(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return tf32_of(all[column * 4 + k % 4].b[k / 4]); });
}

void add_double(double (&c)[2], const simt::Lanes<DoubleOperands>& all) {
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 4; ++k) c[i] = fma(all[g * 4 + k].a, all[(2 * t + i) * 4 + k].b, c[i]);
}

}  // namespace knowedit::simt_mma
