// The head of a program: hidden states to scores, or at once to the tokens that are chosen from them.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "program.hpp"

namespace penstock {

Rows Program::head_rows(const Weight& weight, const bf16* hidden, int num_rows) {
    if (num_rows > max_tokens_) throw std::invalid_argument("more rows than the program has room for");
    std::size_t stride = up(weight.k, GROUP) + 32;
    if (!wants_ints(weight)) {
        head_rows_.assign(stride * num_rows, 0);
        for (int r = 0; r < num_rows; r++)
            std::memcpy(head_rows_.data() + r * stride, hidden + static_cast<std::size_t>(r) * weight.k, weight.k * sizeof(bf16));
        return {head_rows_.data(), stride, nullptr, nullptr, 0};
    }
    auto found = ints_of_.find(weight.k);
    if (found == ints_of_.end()) found = ints_of_.emplace(weight.k, ints_for(weight.k)).first;
    Ints& ints = ints_[found->second];
    for (int r = 0; r < num_rows; r++)
        quantize(hidden + static_cast<std::size_t>(r) * weight.k, weight.k, weight.rotation, ints, r, 0);
    return {ints.data.get(), ints.stride, ints.scale.data(), ints.sums.data(), ints.sums_stride};
}

void Program::head(const Weight& weight, const bf16* hidden, int num_rows, float* out) {
    Rows rows = head_rows(weight, hidden, num_rows);
    int columns = columns_per_unit(weight);
    head_deal_.reset((weight.n_pad + columns - 1) / columns);
    team_.run([&](int member) {
        product(weight, rows, num_rows, member, head_deal_, [&](int row, int column, int width, float* c) {
            int used = std::min(width, weight.n - column);
            float* to = out + static_cast<std::size_t>(row) * weight.n + column;
            if (used > 0) std::memcpy(to, c, used * sizeof(float));
            if (weight.bias)
                for (int i = 0; i < used; i++) to[i] += weight.bias[column + i];
        });
    });
}

void Program::choose(const Weight& weight, const bf16* hidden, int num_rows, const Choosing& how, std::int64_t* tokens) {
    double start = now();
    Rows rows = head_rows(weight, hidden, num_rows);
    choosers_.resize(team_.size());
    stored_.assign(num_rows, -1);
    for (int begin = 0; begin < num_rows;) {
        int end = begin, held = 0;
        for (; end < num_rows && held < SCORE_ROWS; end++) {
            bool has_edits = !how.edits.empty() && !how.edits[end].empty(), reports = !how.raw.empty() && how.raw[end];
            if (!how.wishes[end].is_greedy() || has_edits || reports) stored_[end] = held++;
        }
        std::size_t stride = up(weight.n, NOISE_GROUP) + 16, bytes = up(held * stride * sizeof(float), 64);
        if (bytes > scores_bytes_) {
            scores_bytes_ = 0;
            scores_ = {static_cast<char*>(std::aligned_alloc(64, bytes)), std::free};
            if (!scores_) throw std::bad_alloc();
            scores_bytes_ = bytes;
        }
        choose_some(weight, rows, how, begin, end, tokens);
        begin = end;
    }
    choosing_seconds_ += now() - start;
}

// Rows [begin, end): one pass over the weights, then row by row.
void Program::choose_some(const Weight& weight, const Rows& rows, const Choosing& how, int begin, int end, std::int64_t* tokens) {
    int columns = columns_per_unit(weight), num = end - begin, members = team_.size();
    std::size_t stride = up(weight.n, NOISE_GROUP) + 16;
    float* scores = reinterpret_cast<float*>(scores_.get());
    tops_.assign(static_cast<std::size_t>(members) * num * COLUMNS, -std::numeric_limits<float>::infinity());
    tops_at_.assign(tops_.size(), -1);
    head_deal_.reset((weight.n_pad + columns - 1) / columns);
    choosing_.reset(num);
    team_.run([&](int member) {
        product(weight, from_row(rows, begin), num, member, head_deal_, [&](int row, int column, int width, float* c) {
            int used = std::min(width, weight.n - column);
            if (used <= 0) return;
            if (weight.bias)
                for (int i = 0; i < used; i++) c[i] += weight.bias[column + i];
            if (int place = stored_[begin + row]; place >= 0) {
                std::memcpy(scores + place * stride + column, c, used * sizeof(float));
            } else {
                std::size_t at = (static_cast<std::size_t>(member) * num + row) * COLUMNS;
                kernels_.best(c, used, column, &tops_[at], &tops_at_[at]);
            }
        });
        team_.meet();
        int exhausted = 0;
        for (int row; (row = choosing_.next(member, members, exhausted)) >= 0;) {
            int place = stored_[begin + row];
            if (place >= 0) {
                float* own = scores + place * stride;
                if (!how.raw.empty() && how.raw[begin + row]) std::memcpy(how.raw[begin + row], own, weight.n * sizeof(float));
                if (!how.edits.empty()) edit_scores(how.edits[begin + row], own, weight.n);
                tokens[begin + row] = choosers_[member].choose(kernels_, own, weight.n, how.wishes[begin + row]);
                continue;
            }
            float top = -std::numeric_limits<float>::infinity();
            std::int64_t token = NO_TOKEN;
            for (int other = 0; other < members && token != NOT_A_NUMBER; other++)
                for (int lane = 0; lane < COLUMNS; lane++) {
                    std::size_t at = (static_cast<std::size_t>(other) * num + row) * COLUMNS + lane;
                    if (tops_[at] != tops_[at]) {
                        token = NOT_A_NUMBER;
                        break;
                    }
                    if (tops_[at] > top || (tops_[at] == top && token >= 0 && tops_at_[at] < token))
                        top = tops_[at], token = tops_at_[at];
                }
            tokens[begin + row] = token;
        }
    });
}

}  // namespace penstock
