// The CUDA runtime as far as launch code may call it: devices, errors, fills and copies, and what a launch may ask for.
#include "simt.h"

namespace simt {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kStaticShared = 48 << 10;  // bytes a kernel may use without asking
constexpr size_t kMostShared = 163 << 10;   // bytes a kernel may ask for on sm_80
constexpr int kDevices = 4;

std::vector<Launch> record;
std::vector<std::pair<const void*, size_t>> allowed;
cudaError_t next_status = cudaSuccess, last_status = cudaSuccess;
int current_device = 0;

cudaError_t objection(const Launch& launch, const void* kernel) {
    const dim3 grid = launch.grid, size = launch.block;
    const uint64_t count = uint64_t{size.x} * size.y * size.z;
    const bool fits = count > 0 && count <= kMostThreads && size.z <= 64 && grid.x > 0 && grid.x < (1u << 31) &&
                      grid.y > 0 && grid.y < (1u << 16) && grid.z > 0 && grid.z < (1u << 16);
    size_t most = kStaticShared;
    for (const auto& entry : allowed)
        if (entry.first == kernel) most = std::max(most, entry.second);
    if (!fits) return cudaErrorInvalidConfiguration;
    return launch.shared > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

std::vector<Launch>& launches() { return record; }
void fail_next_launch(cudaError_t status) { next_status = status; }
int device() { return current_device; }

void allow_shared(const void* kernel, size_t bytes) {
    if (bytes > kMostShared) next_status = cudaErrorInvalidValue;
    allowed.emplace_back(kernel, bytes);
}

bool admit(const Launch& launch, const void* kernel) {
    record.push_back(launch);
    last_status = next_status, next_status = cudaSuccess;
    if (last_status == cudaSuccess && kernel) last_status = objection(launch, kernel);
    return last_status == cudaSuccess;
}

}  // namespace simt

using namespace simt;

const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
    }
    return "unknown error";
}
cudaError_t cudaGetLastError() { return std::exchange(last_status, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= kDevices) return cudaErrorInvalidValue;
    return current_device = device, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 8;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    if (!admit({0, 0, bytes, stream, current_device}, nullptr)) return cudaGetLastError();
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    if (!admit({0, 0, bytes, stream, current_device}, nullptr)) return cudaGetLastError();
    memmove(to, from, bytes);
    return cudaSuccess;
}
