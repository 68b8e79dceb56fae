// moment_update by wgmma as far as it can be without a GPU: what its descriptors and boxes make of TMA's and wgmma's
// rules, which are written down here a second time, after the PTX ISA.
#include "../cuda/panels_sm90.h"
#include "strided.h"

using namespace knowedit;
using namespace knowedit::sm90;
using cases::require;

namespace {

using Half = Float16;

constexpr uint32_t kBase = 5 * kAlign;  // where the stage lies in shared memory

struct Shared {
    std::vector<unsigned char> memory = cases::unwritten<unsigned char>(kBase + kStageBytes);

    Half& at(uint32_t address) {
        require(address % 2 == 0 && address >= kBase && address + 2 <= memory.size(), "address ", address);
        return *reinterpret_cast<Half*>(memory.data() + address);
    }

    // CU_TENSOR_MAP_SWIZZLE_128B: of every 1024 bytes, which are 8 rows, the 16-byte pieces of row r are exchanged by
    // r.
    void bring(cases::Strided<Half>& x, uint32_t to, int64_t column, int64_t row, const TensorMap& map) {
        for (uint32_t r = 0; r < map.box[1]; ++r)
            for (uint32_t c = 0; c < map.box[0]; ++c) {
                const bool inside =
                    static_cast<uint64_t>(row + r) < map.size[1] && static_cast<uint64_t>(column + c) < map.size[0];
                const uint32_t piece = (c / 8) ^ (r % 8);
                Half& put = at(to + r * map.box[0] * 2 + piece * 16 + c % 8 * 2);
                narrow(0.0f, &put);
                if (inside) put = x.at(row + r, column + c);
            }
    }
};

// The operand a descriptor names where the instruction transposes it, elements (i, k): i along memory. Swizzled atoms
// of 64 x 8: `leading` to the next 64 of i, `stride` to the next 8 of k; address bits 4-6 are exchanged by bits 7-9.
std::vector<double> operand(Shared& shared, uint64_t descriptor, int size) {
    const auto field = [&](int low) { return static_cast<uint32_t>(descriptor >> low & 0x3fff) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    require(descriptor >> 46 == 1 << 16, "other bits than the swizzle's are set");
    require(start % kAlign == 0 && leading % kAlign == 0 && stride % kAlign == 0, "the swizzle starts elsewhere");
    std::vector<double> out;
    for (uint32_t i = 0; i < static_cast<uint32_t>(size); ++i)
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t plain = start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2;
            out.push_back(cases::value(shared.at(plain ^ ((plain >> 7 & 7) << 4))));
        }
    return out;
}

// What all blocks add to acc.
void update(cases::Strided<double>& acc, cases::Strided<Half>& x, const MomentUpdate& p) {
    const TensorMap map = tensor_map(p);
    Shared shared;
    for (int64_t block = 0; block < tile_count(p.width); ++block) {
        const Tile at = tile(block, p.width);
        std::vector<double> sum(kTileRows * kTileColumns);
        for (int64_t row = 0; row < p.rows; row += kDepth) {
            for (int box = 0; box < kBoxes; ++box)
                shared.bring(x, kBase + box * kBoxBytes, box_column(at, box), row, map);
            for (int k = 0; k < kDepth / 16; ++k)
                for (int group = 0; group < kTileRows / kGroupRows; ++group) {
                    const auto left = operand(shared, descriptor(kBase + left_offset(group, k)), kGroupRows);
                    const auto right = operand(shared, descriptor(kBase + right_offset(k)), kTileColumns);
                    for (int m = 0; m < kGroupRows; ++m)
                        for (int n = 0; n < kTileColumns; ++n)
                            for (int i = 0; i < 16; ++i)
                                sum[(group * kGroupRows + m) * kTileColumns + n] +=
                                    left[m * 16 + i] * right[n * 16 + i];
                }
        }
        for (int64_t m = 0; m < kTileRows; ++m)
            for (int64_t n = 0; n < kTileColumns; ++n)
                if (at.row + m < p.width && at.column + n <= at.row + m)
                    acc.at(at.row + m, at.column + n) += sum[m * kTileColumns + n];
    }
}

}  // namespace

KNOWEDIT_CASE(wgmma_reads_what_tma_brings) {
    if (seed) return;  // no kernel
    struct Size {
        int64_t rows, width, pad;
    };
    for (const auto& [rows, width, pad] : {Size{70, 300, 4}, Size{17, 8, 0}}) {
        std::mt19937 random(static_cast<unsigned>(width));
        cases::Strided<Half> x(rows, width, pad);
        x.fill(random);
        cases::Strided<double> acc(width, width);
        for (int64_t r = 0; r < width; ++r)
            for (int64_t c = 0; c <= r; ++c) acc.at(r, c) = 0;
        update(acc, x,
               {acc.data(), x.data(), nullptr, DType::Float64, DType::Float16, rows, width, width, x.stride, 4096});
        std::vector<double> got, truth;
        for (int64_t r = 0; r < width; ++r)
            for (int64_t c = 0; c <= r; ++c) {
                got.push_back(acc.at(r, c)), truth.push_back(0);
                for (int64_t i = 0; i < rows; ++i) truth.back() += x.value(i, r) * x.value(i, c);
            }
        cases::require_close(got, truth, 1e-14, "acc", static_cast<double>(rows));
    }
}

KNOWEDIT_CASE(wgmma_tiles_hold_every_element_once) {
    if (seed) return;
    for (int64_t width : {1, 128, 129, 256, 257, 1000, 17 * 256}) {
        constexpr int64_t step = kTileRows;
        const int64_t side = (width + step - 1) / step;
        std::vector<int> seen(side * side);
        for (int64_t i = 0; i < tile_count(width); ++i) {
            const Tile at = tile(i, width);
            require(at.row % step == 0 && at.column % kTileColumns == 0, "tile ", i, " of width ", width);
            if (at.row >= width) continue;
            for (int64_t c = at.column / step; c < std::min(side, (at.column + kTileColumns) / step); ++c)
                ++seen[at.row / step * side + c];
        }
        for (int64_t i = 0; i < side * side; ++i)
            require(i % side > i / side ? seen[i] <= 1 : seen[i] == 1, "part ", i, " of width ", width);
    }
}

// Of m64n256's sums (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", accumulator D).
KNOWEDIT_CASE(wgmma_sums_lie_where_they_should) {
    if (seed) return;
    std::vector<int> seen(kGroupRows * kTileColumns);
    for (int thread = 0; thread < kGroupThreads; ++thread)
        for (int i = 0; i < kSums; ++i) ++seen[sum_row(thread, i) * kTileColumns + sum_column(thread, i)];
    for (int count : seen) require(count == 1, "an element is held ", count, " times");
    const auto require_at = [](int thread, int i, int row, int column) {
        require(sum_row(thread, i) == row && sum_column(thread, i) == column, "sum ", i, " of thread ", thread);
    };
    require_at(0, 0, 0, 0), require_at(0, 1, 0, 1), require_at(0, 2, 8, 0), require_at(0, 3, 8, 1);
    require_at(0, 4, 0, 8), require_at(1, 0, 0, 2), require_at(4, 0, 1, 0), require_at(31, 3, 15, 7);
    require_at(32, 0, 16, 0), require_at(127, 127, 63, 255);
}

KNOWEDIT_CASE(wgmma_descriptor_bits) {
    if (seed) return;
    static_assert(descriptor(0) == 0x4000'0040'0200'0000);
    static_assert(descriptor(0x12340) == 0x4000'0040'0200'1234);
    static_assert(descriptor(left_offset(1, 2)) == descriptor(0) + (8192 + 4096) / 16);
    static_assert(descriptor(right_offset(3)) == descriptor(0) + (2 * 8192 + 6144) / 16);
}

KNOWEDIT_CASE(wgmma_takes_rows_that_tma_reads) {
    if (seed) return;
    alignas(16) unsigned char memory[32];
    const auto reads = [&](int offset, int64_t width, int64_t row, DType type = DType::BFloat16, int64_t rows = 5) {
        return tma_reads({nullptr, memory + offset, nullptr, DType::Float64, type, rows, width, width, row, 4096});
    };
    require(reads(0, 8, 8) && reads(16, 7, 16, DType::Float16), "aligned rows");
    require(!reads(2, 8, 8) && !reads(0, 7, 7) && !reads(0, 7, 12), "unaligned rows");
    require(!reads(0, 16, 8) && !reads(0, 16, 0), "rows that overlap");
    require(!reads(0, 8, 8, DType::Float32) && !reads(0, 8, 8, DType::Float64), "wider numbers");
    require(!reads(0, 8, 8, DType::BFloat16, int64_t{1} << 31) && !reads(0, 8, int64_t{1} << 39), "too far");
}

KNOWEDIT_CASE(wgmma_is_not_for_builds_without_it) {
    if (seed) return;
    alignas(16) Half x[8] = {};
    double acc[64] = {};
    require(!moment_update_has_wgmma({acc, x, nullptr, DType::Float64, DType::Float16, 1, 8, 8, 8, 64}, 0),
            "no sm_90a");
}
