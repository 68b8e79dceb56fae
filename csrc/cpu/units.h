// Rows are cut into units: up to kUnitRows consecutive rows of one segment, which share their ancestors' keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "knowedit/tree_attention.h"

namespace knowedit {

constexpr int64_t kUnitRows = 32;
constexpr int64_t kWorthThreads = 1 << 20;  // multiply-adds below which starting threads costs more than it brings

struct Unit {
    int32_t line;   // segment
    int32_t first;  // row within it
    int32_t count;  // rows
};

struct Span {
    int64_t begin, end;
};

struct Run {  // consecutive visible keys
    int64_t row, position, count;
};

// The ancestors' visible keys, nearest first.
inline void climb(const TreeAttention& p, const Segment& from, std::vector<Run>& runs) {
    runs.clear();
    int64_t limit = from.position;
    for (int32_t at = from.parent; at >= 0; at = p.segments[at].parent) {
        const Segment& s = p.segments[at];
        const int64_t end = std::min<int64_t>(int64_t{s.position} + s.length, limit);
        if (end > s.position) runs.push_back({s.kv_row, s.position, end - s.position});
        limit = std::min<int64_t>(limit, s.position);
    }
}

// The keys one unit sees, in ascending position: where each key and value row starts, in elements.
struct Keys {
    std::vector<Run> runs;
    std::vector<int64_t> row, position, k_at, v_at;

    void collect(const TreeAttention& p, const Unit& unit) {
        const Segment& s = p.segments[unit.line];
        climb(p, s, runs);
        row.clear(), position.clear();
        const int64_t oldest = p.window > 0 ? int64_t{s.position} + unit.first - p.window : -1;  // out of sight for all
        auto append = [&](const Run& run) {
            for (int64_t i = std::max<int64_t>(0, oldest + 1 - run.position); i < run.count; ++i)
                row.push_back(run.row + i), position.push_back(run.position + i);
        };
        std::for_each(runs.rbegin(), runs.rend(), append);
        append({s.kv_row, s.position, int64_t{unit.first} + unit.count});
        k_at.resize(row.size()), v_at.resize(row.size());
    }

    void place(int64_t k_stride, int64_t v_stride, bool gathered) {
        for (size_t j = 0; j < row.size(); ++j) {
            const int64_t at = gathered ? static_cast<int64_t>(j) : row[j];
            k_at[j] = at * k_stride, v_at[j] = at * v_stride;
        }
    }

    // The keys [begin, end) that the unit's row i sees.
    Span seen(const TreeAttention& p, const Unit& unit, int64_t i) const {
        const int64_t end = static_cast<int64_t>(row.size()) - unit.count + i + 1;
        if (p.window == 0) return {0, end};
        const int64_t oldest = p.segments[unit.line].position + unit.first + i - p.window;  // out of sight
        return {std::upper_bound(position.begin(), position.begin() + end, oldest) - position.begin(), end};
    }
};

// All units, and how many query-key pairs a head has.
inline int64_t cut(const TreeAttention& p, std::vector<Unit>& units) {
    std::vector<Run> runs;
    int64_t pairs = 0;
    for (int64_t line = 0; line < p.segment_count; ++line) {
        const Segment& s = p.segments[line];
        if (s.query_row < 0) continue;
        climb(p, s, runs);
        int64_t above = 0;
        for (const Run& run : runs) above += run.count;
        pairs += s.length * (above + s.length / 2 + 1);
        for (int64_t first = 0; first < s.length; first += kUnitRows)
            units.push_back({static_cast<int32_t>(line), static_cast<int32_t>(first),
                             static_cast<int32_t>(std::min(kUnitRows, s.length - first))});
    }
    return pairs;
}

}  // namespace knowedit
