#include "isa.h"

#include <atomic>
#include <stdexcept>

#include "knowedit/cpu_isa.h"

namespace knowedit {
namespace {

struct Isa {
    const char* name;
    const AttendBodies& attend;
    const LowRankBodies& low_rank;
};

const Isa baseline{"baseline", attend_baseline, low_rank_baseline};
#ifdef KNOWEDIT_X86
const Isa avx2{"avx2", attend_avx2, low_rank_avx2};
const Isa avx512{"avx512", attend_avx512, low_rank_avx512};
#endif

std::vector<const Isa*> usable() {
    std::vector<const Isa*> found;
#ifdef KNOWEDIT_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        found.push_back(&avx512);
    if (has_avx2) found.push_back(&avx2);
#endif
    found.push_back(&baseline);
    return found;
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> isa{usable().front()};
    return isa;
}

}  // namespace

const AttendBodies& attend_bodies() { return current().load()->attend; }
const LowRankBodies& low_rank_bodies() { return current().load()->low_rank; }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const auto* isa : usable()) names.emplace_back(isa->name);
    return names;
}

std::string cpu_isa() { return current().load()->name; }

void use_cpu_isa(const std::string& name) {
    for (const auto* isa : usable())
        if (name == isa->name) {
            current() = isa;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

}  // namespace knowedit
