// The wrappers of cuda/mma.cuh: products of whole tiles, laid out as the table there (and PTX) says.
#include "../cuda/mma.cuh"
#include "cases.h"

using namespace knowedit;

namespace {

template <typename T>
uint32_t pair(T low, T high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// a [16, 16], b [16, 8], c [16, 8], row by row.
template <typename T>
__global__ void half_tile(const T* a, const T* b, float* c) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) {
        const T* at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
        left[i] = pair(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) right[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_16x8x16<T>(sum, left, right);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The same with the operands brought by load_matrices.
template <typename T>
__global__ void loaded_tile(const T* a, const T* b, float* c) {
    struct alignas(16) Tiles {
        T a[16 * 16], b[16 * 8];
    };
    Tiles& tiles = block_shared<Tiles>();
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 32; i += kWarp) copy_async<16>(tiles.a + 8 * i, a + 8 * i);
    if (lane < 16) copy_async<16>(tiles.b + 8 * lane, b + 8 * lane);
    commit_copies();
    await_copies<0>();
    __syncthreads();
    uint32_t left[4], right[2];
    load_matrices(left, tiles.a + (lane % 16) * 16 + lane / 16 * 8);
    load_matrices<2, true>(right, tiles.b + lane % 16 * 8);
    float sum[4] = {};
    mma_16x8x16<T>(sum, left, right);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void tf32_tile(const float* a, const float* b, float* c) {  // a [16, 8], b [8, 8]
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = to_tf32(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
    for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
    float sum[4] = {};
    mma_16x8x8_tf32(sum, left, right);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void double_tile(const double* a, const double* b, double* c) {  // a [8, 4], b [4, 8]
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double sum[2] = {};
    mma_8x8x4(sum, a[g * 4 + t], b[t * 8 + g]);
    for (int i = 0; i < 2; ++i) c[g * 8 + 2 * t + i] = sum[i];
}

template <typename T>
std::vector<double> product(const std::vector<T>& a, const std::vector<T>& b, int rows, int depth, int columns) {
    std::vector<double> c(rows * columns);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j)
            for (int k = 0; k < depth; ++k)
                c[i * columns + j] += cases::value(a[i * depth + k]) * cases::value(b[k * columns + j]);
    return c;
}

template <typename T, typename C>
void check_tile(int rows, int depth, void (*tile)(const T*, const T*, C*), double tolerance, float before) {
    std::mt19937 random(7);
    const auto a = cases::normal<T>(rows * depth, random), b = cases::normal<T>(depth * 8, random);
    std::vector<C> c(rows * 8, before);
    launch("tile", {1, kWarp, 0, nullptr}, tile, a.data(), b.data(), c.data());
    std::vector<double> truth = product(a, b, rows, depth, 8);
    for (double& x : truth) x += before;
    cases::require_close(c, truth, tolerance, "a tile");
}

}  // namespace

KNOWEDIT_CASE(mma_tiles) {
    check_tile<BFloat16, float>(16, 16, half_tile<BFloat16>, 1e-6, 3);
    check_tile<Float16, float>(16, 16, half_tile<Float16>, 1e-6, -1);
    check_tile<BFloat16, float>(16, 16, loaded_tile<BFloat16>, 1e-6, 0);
    check_tile<Float16, float>(16, 16, loaded_tile<Float16>, 1e-6, 0);
    check_tile<float, float>(16, 8, tf32_tile, 3e-3, 0);
    check_tile<double, double>(8, 4, double_tile, 1e-15, 0);
}

KNOWEDIT_CASE(mma_to_tf32_rounds_to_ten_bits) {
    cases::require(bits_float(to_tf32(1.0f)) == 1.0f);
    cases::require(bits_float(to_tf32(1.0f + 0x1p-11f)) == 1.0f + 0x1p-10f, "ties go away from zero");
    cases::require(bits_float(to_tf32(-1.0f - 0x1p-11f)) == -1.0f - 0x1p-10f);
    cases::require(bits_float(to_tf32(1.0f + 0x1.8p-12f)) == 1.0f);
    cases::require(std::isinf(bits_float(to_tf32(INFINITY))) && std::isnan(bits_float(to_tf32(NAN))));
}
