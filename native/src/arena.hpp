// Memory for packed weights in one stretch of huge pages, made ready by a thread ahead of its use.
//
// The first touch of a page costs more than reading a checkpoint's bytes into it: the kernel clears it, and a virtual
// machine may have to fetch it from its host (0.5 s per GiB measured, more after idle times). That can go on while
// Python imports torch. Knows no weight.
#pragma once
#include <atomic>
#include <cstddef>
#include <mutex>
#include <thread>

namespace penstock {

class Arena {
public:
    explicit Arena(std::size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Zeroed memory aligned to a cache line; nullptr when there is not enough left. From any thread.
    char* take(std::size_t bytes);

    // Nothing is taken any more: ends the thread and gives back what was made ready in vain.
    void finish();

    std::size_t taken_bytes() const { return taken_; }

private:
    void make_ready();

    char* mapping_;
    std::size_t mapping_bytes_;
    char* begin_;
    std::size_t bytes_;
    std::mutex lock_;
    std::size_t taken_ = 0;
    std::atomic<bool> leaving_{false};
    std::thread thread_;
};

}  // namespace penstock
