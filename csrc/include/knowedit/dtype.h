// Element types the native core knows. The numbers are the contract with ops/launch.py.
#pragma once

namespace knowedit {

enum class DType : int { Float32 = 0, Float64 = 1, BFloat16 = 2, Float16 = 3 };

}  // namespace knowedit
