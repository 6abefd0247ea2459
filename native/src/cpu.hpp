// Which instruction sets this machine has and this process may use, best first.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace penstock {

// Tables that are built in and can run here. Empty: nothing can, and plain torch computes.
std::vector<const Kernels*> usable_kernels();

}  // namespace penstock
