// The keys and values that attention reads next, asked for while those before them are computed with.
namespace penstock::PENSTOCK_ISA {

// Walks over their lines at the pace of the work: a block is a page or less, no hardware reads ahead into the next one,
// and a burst of requests would stop the work until memory has answered.
class Ahead {
public:
    Ahead() = default;  // nothing

    // `pace`: lines asked for per line that is used.
    Ahead(const AttendPiece& piece, std::size_t head_bytes, int pace)
        : blocks_(piece.ahead_blocks), num_blocks_(piece.num_ahead), left_(2 * piece.num_ahead), pace_(pace),
          heads_(piece.ahead), block_bytes_(piece.block_bytes), value_bytes_(piece.value_bytes), head_bytes_(head_bytes) {
        step();
    }

    // So many lines are about to be used.
    inline __attribute__((always_inline)) void ask(int lines) {
        if (at_ == end_) return;
        lines *= pace_;
        for (int i = 0; i < lines; i++) __builtin_prefetch(at_ + 64 * i, 0, 2);
        at_ += 64 * lines;
        if (at_ >= end_) step();
    }

private:
    // To the next head: the keys of all blocks, then their values.
    __attribute__((noinline)) void step() {
        at_ = end_ = nullptr;
        if (left_ == 0) return;
        int block = 2 * num_blocks_ - left_--;
        bool is_key = block < num_blocks_;
        at_ = heads_ + blocks_[is_key ? block : block - num_blocks_] * block_bytes_ + (is_key ? 0 : value_bytes_);
        end_ = at_ + head_bytes_;
    }

    const char *at_ = nullptr, *end_ = nullptr;
    const std::int32_t* blocks_ = nullptr;
    int num_blocks_ = 0, left_ = 0, pace_ = 0;  // left_: heads
    const char* heads_ = nullptr;
    std::size_t block_bytes_ = 0, value_bytes_ = 0, head_bytes_ = 0;
};

}  // namespace penstock::PENSTOCK_ISA
