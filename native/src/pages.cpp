#include "pages.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace penstock {

namespace {
constexpr std::size_t HUGE_PAGE = 2 << 20, SLAB = 8 * HUGE_PAGE, LINE = 64;

std::shared_ptr<char> whole_pages(std::size_t bytes) {
    std::size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* data = std::aligned_alloc(HUGE_PAGE, size);
    if (!data) throw std::bad_alloc();
    madvise(data, size, MADV_HUGEPAGE);  // a wish: without huge pages it is slower, no worse
    return {static_cast<char*>(data), std::free};
}
}  // namespace

std::shared_ptr<char> pages(std::size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<char> slab;
    static std::size_t used = 0;
    if (bytes >= HUGE_PAGE) return whole_pages(bytes);
    std::lock_guard lock(mutex);
    std::shared_ptr<char> owner = slab.lock();
    if (!owner || used + bytes > SLAB) {
        owner = whole_pages(SLAB);
        slab = owner, used = 0;
    }
    char* at = owner.get() + used;
    used += (bytes + LINE - 1) / LINE * LINE;
    return {owner, at};
}

}  // namespace penstock
