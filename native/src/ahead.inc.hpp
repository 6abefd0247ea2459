// The keys and values that attention reads next, asked for while those before them are computed with.
namespace penstock::PENSTOCK_ISA {

// Walks over their lines at the pace of the work: a block is a page or less, no hardware reads ahead into the next one,
// and a burst of requests would stop the work until memory has answered. Every line is asked for twice, a head apart: a
// processor whose queue is full drops what is only a hint (Zen 4: a tenth to a sixth more bandwidth than once).
class Ahead {
public:
    Ahead() = default;  // nothing

    // `pace`: lines asked for per line that is used.
    Ahead(const char* const* heads, int num_heads, std::size_t head_bytes, int pace)
        : next_(heads), left_(num_heads), pace_(pace), head_bytes_(head_bytes) {
        step();
    }

    // So many lines are about to be used.
    inline __attribute__((always_inline)) void ask(int lines) {
        if (at_ == end_) return;
        lines *= pace_;
        if (at_ + 64 * lines > end_) lines = static_cast<int>((end_ - at_) / 64);
        for (int i = 0; i < lines; i++) {
            __builtin_prefetch(at_ + 64 * i, 0, 2);
            __builtin_prefetch(at_ + to_last_ + 64 * i, 0, 2);
        }
        at_ += 64 * lines;
        if (at_ == end_) step();
    }

private:
    __attribute__((noinline)) void step() {
        const char* last = end_;
        at_ = end_ = nullptr;
        if (left_-- <= 0) return;
        at_ = *next_++, end_ = at_ + head_bytes_;
        to_last_ = last ? last - end_ : 0;
    }

    const char *at_ = nullptr, *end_ = nullptr;
    std::ptrdiff_t to_last_ = 0;  // from the head being asked for to the one before it
    const char* const* next_ = nullptr;
    int left_ = 0, pace_ = 0;
    std::size_t head_bytes_ = 0;
};

}  // namespace penstock::PENSTOCK_ISA
