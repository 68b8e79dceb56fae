// What moment_update_sm90.cu settles without a GPU: which part of x a block reads, where TMA puts it, and where wgmma
// looks for it. Plain C++, so that it is tested on the CPU.
//
// A block has 128 x 256 elements of the triangle. A step multiplies 64 rows of x: two boxes of 64 columns on the left,
// four on the right. A box lies as TMA writes it with its 128-byte swizzle: row r is the 128 bytes from 128 r on, of
// which the 16 bytes number c are number c ^ (r % 8) there. wgmma reads it with the same swizzle as a transposed
// operand ("MN-major": columns of x run along the bytes, rows of x along k).
#pragma once

#include "knowedit/moment_update.h"
#include "knowedit/triangle.h"

namespace knowedit {
namespace sm90 {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 256;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroupThreads = 128;
constexpr int kSums = kTileColumns / 2;  // of a thread

constexpr int kDepth = 64;       // rows of x of a step
constexpr int kBoxColumns = 64;  // 128 bytes
constexpr int kRowBytes = 128;
constexpr int kBoxBytes = kDepth * kRowBytes;
constexpr int kLeftBoxes = kTileRows / kBoxColumns;
constexpr int kBoxes = kLeftBoxes + kTileColumns / kBoxColumns;
constexpr int kStageBytes = kBoxes * kBoxBytes;
constexpr int kStages = 4;
constexpr int kAlign = 1024;  // the swizzle repeats every 1024 bytes

// ---- the triangle ----

struct Tile {
    int64_t row, column;  // of acc, of the tile's first element
};

constexpr int64_t squares(int64_t width) { return (width + kTileColumns - 1) / kTileColumns; }
constexpr int64_t tile_count(int64_t width) { return 2 * triangle_tiles(squares(width)); }

// Squares of the triangle, the upper half of each before the lower: both read the same columns on the right.
KNOWEDIT_ANYWHERE inline Tile tile(int64_t index, int64_t width) {
    const TilePlace square = triangle_tile(index / 2, (width + kTileColumns - 1) / kTileColumns);
    return {square.row * kTileColumns + index % 2 * kTileRows, square.column * kTileColumns};
}

// ---- TMA ----

// The first column of box number `box` of a step.
KNOWEDIT_ANYWHERE constexpr int64_t box_column(const Tile& at, int box) {
    return box < kLeftBoxes ? at.row + box * kBoxColumns : at.column + (box - kLeftBoxes) * kBoxColumns;
}

struct TensorMap {  // innermost dimension first
    uint64_t size[2];
    uint64_t stride;  // of a row, in bytes
    uint32_t box[2];
};

inline TensorMap tensor_map(const MomentUpdate& p) {
    return {{static_cast<uint64_t>(p.width), static_cast<uint64_t>(p.rows)},
            static_cast<uint64_t>(p.x_row) * 2,
            {kBoxColumns, kDepth}};
}

// Whether x is what TMA can read: 16-bit numbers, 16-byte aligned, rows that do not overlap, coordinates of 32 bits.
inline bool tma_reads(const MomentUpdate& p) {
    constexpr int64_t most = INT32_MAX - kTileColumns;
    return (p.x_dtype == DType::BFloat16 || p.x_dtype == DType::Float16) &&
           reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_row % 8 == 0 && p.x_row >= p.width &&
           p.x_row < int64_t{1} << 39 && p.rows <= most && p.width <= most;
}

// ---- wgmma ----

// Offsets in a stage of 16 rows of x from 16 k on: 64 columns of warpgroup `group`, or all 256.
KNOWEDIT_ANYWHERE constexpr uint32_t left_offset(int group, int k) { return group * kBoxBytes + k * 16 * kRowBytes; }
KNOWEDIT_ANYWHERE constexpr uint32_t right_offset(int k) { return kLeftBoxes * kBoxBytes + k * 16 * kRowBytes; }

// The operand's descriptor (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"): bits 0-13 the
// address, 16-29 the leading offset (here from 64 columns to the next), 32-45 the stride offset (from 8 rows of x to
// the next), each in 16 bytes; 49-51 zero where the swizzle's repetition is aligned; 62-63 the swizzle, 1: 128 bytes.
KNOWEDIT_ANYWHERE constexpr uint64_t descriptor(uint32_t address) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{kBoxBytes >> 4} << 16 | uint64_t{8 * kRowBytes >> 4} << 32 |
           uint64_t{1} << 62;
}

// The element of a warpgroup's 64 x 256 that is number i of a thread's sums.
KNOWEDIT_ANYWHERE constexpr int sum_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
KNOWEDIT_ANYWHERE constexpr int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace sm90
}  // namespace knowedit
