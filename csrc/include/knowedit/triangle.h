// The tiles on and below the diagonal of a square matrix, in an order that keeps what neighbours read in the cache.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define KNOWEDIT_ANYWHERE __host__ __device__
#else
#define KNOWEDIT_ANYWHERE
#endif

namespace knowedit {

struct TilePlace {
    int64_t row, column;  // in tiles, row >= column
};

constexpr int64_t kStrip = 16;  // tile rows taken together: 256 tiles in flight then read 32 panels, not 257

// Tiles in the first `rows` tile rows.
KNOWEDIT_ANYWHERE constexpr int64_t triangle_tiles(int64_t rows) { return rows * (rows + 1) / 2; }

// The tile row of tile number `index` when tiles are counted row by row.
KNOWEDIT_ANYWHERE inline int64_t triangle_row(int64_t index) {
    auto row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1) - 1) / 2);
    while (triangle_tiles(row) > index) --row;
    while (triangle_tiles(row + 1) <= index) ++row;
    return row;
}

// Where tile number `index` of `rows` tile rows lies: strips of kStrip rows from the top, columns within a strip.
KNOWEDIT_ANYWHERE inline TilePlace triangle_tile(int64_t index, int64_t rows) {
    const int64_t top = triangle_row(index) / kStrip * kStrip;
    const int64_t height = rows - top < kStrip ? rows - top : kStrip;
    int64_t rest = index - triangle_tiles(top);
    if (rest < top * height) return {top + rest % height, rest / height};
    rest -= top * height;
    const int64_t row = triangle_row(rest);
    return {top + row, top + rest - triangle_tiles(row)};
}

}  // namespace knowedit
