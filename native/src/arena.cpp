#include "arena.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "numbers.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace penstock {

namespace {
constexpr std::size_t LINE = 64, HUGE_PAGE = 2 << 20;
}  // namespace

Arena::Arena(std::size_t bytes) : bytes_(up(bytes, HUGE_PAGE)) {
    mapping_bytes_ = bytes_ + HUGE_PAGE;
    void* found = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(found);
    begin_ = reinterpret_cast<char*>(up(reinterpret_cast<std::uintptr_t>(found), HUGE_PAGE));
    madvise(begin_, bytes_, MADV_HUGEPAGE);  // fails harmlessly where there are none
    try {
        thread_ = std::thread([this] { make_ready(); });
    } catch (...) {
        munmap(mapping_, mapping_bytes_);
        throw;
    }
}

Arena::~Arena() {
    finish();
    munmap(mapping_, mapping_bytes_);
}

char* Arena::take(std::size_t bytes) {
    std::lock_guard held(lock_);
    std::size_t size = up(bytes, LINE);
    if (size > bytes_ - taken_) return nullptr;
    taken_ += size;
    return begin_ + taken_ - size;
}

void Arena::finish() {
    leaving_ = true;
    if (thread_.joinable()) thread_.join();
    std::lock_guard held(lock_);
    std::size_t used = up(taken_, HUGE_PAGE);
    if (used < bytes_) madvise(begin_ + used, bytes_ - used, MADV_DONTNEED);
}

// Populating writes nothing over what is there already, so it may run beside those who fill what they took. A kernel
// that does not know it leaves the first touch to them.
void Arena::make_ready() {
    pthread_setname_np(pthread_self(), "penstock-memory");
    for (std::size_t at = 0; at < bytes_ && !leaving_; at += HUGE_PAGE)
        if (madvise(begin_ + at, HUGE_PAGE, MADV_POPULATE_WRITE)) return;
}

}  // namespace penstock
