#include "isa.h"

#include <atomic>
#include <stdexcept>

#include "knowedit/cpu_isa.h"

namespace knowedit {
namespace {

std::vector<const AttendBodies*> usable() {
    std::vector<const AttendBodies*> found;
#ifdef KNOWEDIT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        found.push_back(&attend_avx512);
    if (avx2) found.push_back(&attend_avx2);
#endif
    found.push_back(&attend_baseline);
    return found;
}

std::atomic<const AttendBodies*>& current() {
    static std::atomic<const AttendBodies*> bodies{usable().front()};
    return bodies;
}

}  // namespace

const AttendBodies& attend_bodies() { return *current(); }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const auto* bodies : usable()) names.emplace_back(bodies->name);
    return names;
}

std::string cpu_isa() { return attend_bodies().name; }

void use_cpu_isa(const std::string& name) {
    for (const auto* bodies : usable())
        if (name == bodies->name) {
            current() = bodies;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

}  // namespace knowedit
