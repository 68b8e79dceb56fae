// 16-bit rows on Hopper: one warp brings x by TMA, two warpgroups multiply by wgmma what has come. One block a 128 x
// 256 tile of the triangle, over all rows (panels_sm90.h). Compiled in CI, its addresses tested by csrc/testing; not
// yet run on a GPU, and used only where asked for.
#include <algorithm>

#include "knowedit/moment_update.h"
#include "panels_sm90.h"
#ifndef KNOWEDIT_SIMT
#include <cudaTypedefs.h>

#include "hopper.cuh"
#else
#include "common.cuh"
#endif

namespace knowedit {
namespace {

constexpr const char* kOp = "moment_update";

bool runs_sm90a([[maybe_unused]] int device) {
#ifdef KNOWEDIT_SM90A
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
    return major == 9;
#else
    return false;
#endif
}

}  // namespace

bool moment_update_has_wgmma(const MomentUpdate& params, int device) {
    return sm90::tma_reads(params) && runs_sm90a(device);
}

}  // namespace knowedit

#ifndef KNOWEDIT_SIMT
namespace knowedit {
namespace sm90 {
namespace {

constexpr int kConsumers = kTileRows / kGroupRows * kGroupThreads;
constexpr int kThreads = kConsumers + kGroupThreads;  // the last warpgroup brings x
constexpr size_t kMemory = kAlign + kStages * (kStageBytes + 2 * sizeof(uint64_t));
static_assert(kMemory <= 227 << 10);  // of a block on sm_90

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The stages and their barriers: `full` when the boxes have come, `empty` when every consumer warp has read them.
struct Ring {
    unsigned char* memory;
    uint32_t base;

    __device__ Ring() : memory(dynamic_shared<unsigned char>()) {
        memory += (kAlign - shared_address(memory) % kAlign) % kAlign;
        base = shared_address(memory);
    }
    __device__ uint32_t stage(int64_t step) const { return base + static_cast<uint32_t>(step % kStages) * kStageBytes; }
    __device__ unsigned char* stage_memory(int64_t step) const { return memory + step % kStages * kStageBytes; }
    __device__ uint32_t full(int64_t step) const {
        return base + kStages * kStageBytes + static_cast<uint32_t>(step % kStages) * 8;
    }
    __device__ uint32_t empty(int64_t step) const { return full(step) + kStages * 8; }
    __device__ uint32_t round(int64_t step) const { return static_cast<uint32_t>(step / kStages % 2); }

    __device__ void start() const {  // one thread, before a barrier
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(full(stage), 1);
            init_barrier(empty(stage), kConsumers / kWarp);
        }
        publish_barriers();
    }
};

__device__ inline void bring(const Ring& ring, const CUtensorMap* x, const Tile& at, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
        await(ring.empty(step), ring.round(step) ^ 1);
        arrive_expecting(ring.full(step), kStageBytes);
        for (int box = 0; box < kBoxes; ++box)
            copy_box(ring.stage(step) + box * kBoxBytes, x, static_cast<int>(box_column(at, box)),
                     static_cast<int>(step * kDepth), ring.full(step));
    }
}

// Rows of a step that do not count become zero on both sides (0 x NaN is no zero), before any warpgroup reads them.
__device__ inline void clear_masked(const MomentUpdate& p, int64_t first, unsigned char* stage) {
    constexpr int pieces = kRowBytes / 16;  // a row's 16 bytes keep within its 128
    const int piece = static_cast<int>(threadIdx.x) % pieces;
    for (int row = static_cast<int>(threadIdx.x) / pieces; row < kDepth; row += kConsumers / pieces) {
        if (first + row >= p.rows || p.mask[first + row]) continue;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box)
            *reinterpret_cast<uint4*>(stage + box * kBoxBytes + row * kRowBytes + piece * 16) = make_uint4(0, 0, 0, 0);
    }
    publish_stores();
    meet<1, kConsumers>();
}

// Which of a thread's sums is number i of its first (0) or second (1) row.
__device__ constexpr int of_row(int half, int i) { return i / 2 * 4 + half * 2 + i % 2; }

// acc gains a warpgroup's sums, which start again from zero. (row, column): its first element. What acc holds is read
// kBatch elements at a time, so that they are on their way together.
template <typename A>
__device__ inline void flush(const MomentUpdate& p, float (&sum)[kSums], int64_t row, int64_t column) {
    constexpr int kBatch = 16;
    const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
    row += sum_row(thread, 0), column += sum_column(thread, 0);
    A* to = static_cast<A*>(p.acc) + row * p.acc_row + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t r = row + half * 8;
        // Of the thread's elements of this row, those in the triangle come first.
        const int within = r < p.width ? static_cast<int>(r - column < kTileColumns ? r - column : kTileColumns) : -1;
#pragma unroll
        for (int first = 0; first < kSums / 2; first += kBatch) {
            A before[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (sum_column(0, of_row(half, first + i)) <= within)
                    before[i] = to[sum_column(0, of_row(half, first + i))];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                float& value = sum[of_row(half, first + i)];
                if (sum_column(0, of_row(half, first + i)) <= within)
                    to[sum_column(0, of_row(half, first + i))] = before[i] + static_cast<A>(value);
                value = 0;
            }
        }
        to += 8 * p.acc_row;
    }
}

template <typename T>
__device__ inline void consume(const Ring& ring, const MomentUpdate& p, const Tile& at, int64_t steps, int warp) {
    const int group = warp * kWarp / kGroupThreads, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t together = p.sum_rows / kDepth;  // steps until the sums go to acc
    float sum[kSums] = {};
    for (int64_t first = 0; first < steps; first += together) {
        const int64_t end = first + together < steps ? first + together : steps;
        for (int64_t step = first; step < end; ++step) {
            await(ring.full(step), ring.round(step));
            if (p.mask) clear_masked(p, step * kDepth, ring.stage_memory(step));
            const uint32_t stage = ring.stage(step);
            begin_multiplying();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k)
                multiply<T>(sum, descriptor(stage + left_offset(group, k)), descriptor(stage + right_offset(k)));
            commit_products();
            await_products<1>();  // those of the step before are done
            if (step > first && lane == 0) arrive(ring.empty(step - 1));
        }
        await_products<0>();
        if (lane == 0) arrive(ring.empty(end - 1));
        settle(sum);
        const int64_t row = at.row + group * kGroupRows;
        if (p.acc_dtype == DType::Float64)
            flush<double>(p, sum, row, at.column);
        else
            flush<float>(p, sum, row, at.column);
        settle(sum);
    }
}
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) update(const __grid_constant__ CUtensorMap x, MomentUpdate p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Tile at = tile(blockIdx.x, p.width);
    if (at.row >= p.width) return;
    const Ring ring;
    const int64_t steps = (p.rows + kDepth - 1) / kDepth;
    if (threadIdx.x == 0) ring.start();
    __syncthreads();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // for all it is uniform
    if (warp < kConsumers / kWarp) {
        more_registers<232>();
        consume<T>(ring, p, at, steps, warp);
    } else {
        fewer_registers<40>();
        if (threadIdx.x == kConsumers) bring(ring, &x, at, steps);
    }
#else
    __trap();  // not the code for this GPU: moment_update_has_wgmma says so beforehand
#endif
}

// The driver's function, without linking the driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), kOp);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), kOp);
#endif
    if (result != cudaDriverEntryPointSuccess || !found)
        throw std::runtime_error(
            "moment_update on CUDA: this driver has no cuTensorMapEncodeTiled (CUDA 12 brought it)");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

CUtensorMap encoded(const MomentUpdate& p) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = encoder();
    const TensorMap map = tensor_map(p);
    const cuuint64_t size[2] = {map.size[0], map.size[1]}, stride[1] = {map.stride};
    const cuuint32_t every[2] = {1, 1};
    const auto type = p.x_dtype == DType::Float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap to;
    const CUresult status =
        encode(&to, type, 2, const_cast<void*>(p.x), size, stride, map.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("moment_update on CUDA: cuTensorMapEncodeTiled refuses x [" + std::to_string(p.rows) +
                                 ", " + std::to_string(p.width) + "] (driver error " + std::to_string(status) + ")");
    return to;
}

}  // namespace
}  // namespace sm90

void moment_update_wgmma_cuda(const MomentUpdate& params, int device, void* stream) {
    if (params.rows == 0 || params.width == 0) return;
    const DeviceGuard guard(device, kOp);
    if (!moment_update_has_wgmma(params, device))
        throw std::invalid_argument(
            "moment_update on CUDA: wgmma needs a Hopper GPU, code for sm_90a in this build, and "
            "bfloat16 or float16 rows that lie 16-byte aligned");
    MomentUpdate p = params;
    p.sum_rows = (std::max<int64_t>(p.sum_rows, 1) + sm90::kDepth - 1) / sm90::kDepth * sm90::kDepth;
    const Grid grid{blocks_for(sm90::tile_count(p.width), 1, kOp), sm90::kThreads, sm90::kMemory,
                    static_cast<cudaStream_t>(stream)};
    if (p.x_dtype == DType::BFloat16)
        launch(kOp, grid, sm90::update<__nv_bfloat16>, sm90::encoded(p), p);
    else
        launch(kOp, grid, sm90::update<__half>, sm90::encoded(p), p);
}

}  // namespace knowedit
#endif
