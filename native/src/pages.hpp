// Memory in huge pages. What is smaller than one shares a slab with its neighbours: the matrices of a small model would
// otherwise be thousands of small pages, whose addresses a step must look up one by one. Knows no contents.
#pragma once
#include <cstddef>
#include <memory>

namespace penstock {

// `bytes` at a multiple of 64 (of a huge page where that is asked for), not cleared. Given back with its last owner, a
// slab with the last one of all in it. Throws bad_alloc. Any thread.
std::shared_ptr<char> pages(std::size_t bytes);

}  // namespace penstock
