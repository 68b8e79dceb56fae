// Which instruction set the CPU bodies use: the best this machine has, unless told otherwise (by tests).
#pragma once

#include <string>
#include <vector>

namespace knowedit {

std::vector<std::string> cpu_isas();        // usable here, best first; the last is always "baseline"
std::string cpu_isa();                      // in use
void use_cpu_isa(const std::string& name);  // std::invalid_argument when it is not usable here

}  // namespace knowedit
