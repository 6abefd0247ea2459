// The end of a step, which only the tokens need whose hidden states somebody reads: where it begins, and what is taken
// there. Knows operations and buffers; who reads, and why, is told by the batch.
#include <cstring>
#include <set>

#include "program.hpp"

namespace penstock {

// Behind the last ATTEND all operations are of single rows. What they read is made there, or is carried over.
void Program::end_recording() {
    deals_ = std::vector<Deal>(ops_.size());
    auto of_tokens = [](What what) { return what == What::EMBED || what == What::HEADS || what == What::ATTEND; };
    last_attend_ = static_cast<int>(ops_.size()) - 1;
    while (last_attend_ >= 0 && !of_tokens(ops_[last_attend_].what)) last_attend_--;
    if (last_attend_ >= 0 && ops_[last_attend_].what != What::ATTEND) last_attend_ = -1;
    carried_.clear();
    if (last_attend_ < 0) return;
    std::set<int> known{ops_[last_attend_].to};
    auto reads = [&](int buffer) {
        if (known.insert(buffer).second) carried_.push_back(buffer);
    };
    for (std::size_t i = last_attend_ + 1; i < ops_.size(); i++) {
        reads(ops_[i].from);
        if (ops_[i].what == What::LINEAR_ADD) reads(ops_[i].to);
        known.insert(ops_[i].to);
    }
}

void Program::find_queries(const Batch& batch, bool of_outputs) {
    queries_.clear();
    auto first = [&](int row) { return static_cast<int>(batch.query_start[row]); };
    auto start = [&](int row) { return static_cast<int>(batch.start[row]); };
    if (!of_outputs) {
        for (int r = 0; r < batch.num_rows; r++)
            queries_.push_back({r, first(r), start(r), first(r + 1) - first(r), first(r)});
        return;
    }
    for (int r = 0, i = 0, num; i < batch.num_outputs; i += num) {
        int token = static_cast<int>(batch.outputs[i]);
        while (token >= first(r + 1)) r++;
        num = 1;
        while (i + num < batch.num_outputs && batch.outputs[i + num] == token + num && token + num < first(r + 1)) num++;
        queries_.push_back({r, token, start(r) + token - first(r), num, i});
    }
}

// The rows of outputs to the front of what is carried over. They ascend and never lie behind where they go: in place.
// Each member has whole cache lines of every row.
void Program::gather_outputs(const Batch& batch, int member) {
    constexpr std::size_t LINE = 64;
    for (int number : carried_) {
        const Buffer& buffer = buffers_[number];
        std::size_t row_bytes = buffer.stride * (buffer.kind == Kind::F32 ? sizeof(float) : sizeof(bf16));
        std::size_t lines = row_bytes / LINE, size = team_.size();
        std::size_t begin = lines * member / size * LINE, end = lines * (member + 1) / size * LINE;
        for (int i = 0; i < batch.num_outputs; i++)
            if (char* row = buffer.data.get() + begin; batch.outputs[i] != i)
                std::memcpy(row + i * row_bytes, row + batch.outputs[i] * row_bytes, end - begin);
    }
}

}  // namespace penstock
