// The end of a step, which only the tokens need whose hidden states somebody reads: where it begins, and what is taken
// there. Knows operations and buffers; who reads, and why, is told by the batch.
#include <algorithm>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>

#include "program.hpp"

namespace penstock {

// Behind the last ATTEND all operations are of single rows. What they read is made there, or is carried over.
void Program::end_recording() {
    deals_.clear();
    for (std::size_t i = 0; i < ops_.size(); i++) deals_.emplace_back(team_.size());
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

void Program::check_outputs(const Batch& batch) const {
    if (last_attend_ < 0) throw std::invalid_argument("only rows behind a last attention can be left out");
    const std::int64_t *first = batch.outputs, *end = first + batch.num_outputs;
    if (first == end) return;
    bool ascending = std::adjacent_find(first, end, std::greater_equal<>()) == end;
    if (!ascending || *first < 0 || end[-1] >= std::min<std::int64_t>(batch.num_tokens, batch.query_start[batch.num_rows]))
        throw std::invalid_argument("outputs are tokens of the batch, in ascending order");
}

// What attends: rows as they are, or of each its runs of outputs.
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

// Moves the rows of outputs to the front of what is carried over: in place, because they ascend and a row's new place is
// never behind its old one. Each member moves its own cache lines of every row.
void Program::gather_outputs(const Batch& batch, int member) {
    constexpr std::size_t LINE = 64;
    for (int number : carried_) {
        const Buffer& buffer = buffers_[number];
        std::size_t row_bytes = buffer.stride * (buffer.kind == Kind::F32 ? sizeof(float) : sizeof(bf16));
        std::size_t lines = row_bytes / LINE, size = team_.size();
        std::size_t begin = lines * member / size * LINE, end = lines * (member + 1) / size * LINE;
        char* rows = buffer.data.get() + begin;
        for (int i = 0; i < batch.num_outputs; i++)
            if (batch.outputs[i] != i) std::memcpy(rows + i * row_bytes, rows + batch.outputs[i] * row_bytes, end - begin);
    }
}

}  // namespace penstock
