#include "program.hpp"

#include "pack.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

namespace penstock {

namespace {
constexpr std::size_t ALIGN = 2 << 20;  // of buffers: huge pages

std::unique_ptr<char, void (*)(void*)> zeros(std::size_t bytes) {
    std::size_t size = up(bytes, bytes < ALIGN ? 4096 : ALIGN);
    void* data = std::aligned_alloc(bytes < ALIGN ? 4096 : ALIGN, size);
    if (!data) throw std::bad_alloc();
    if (bytes >= ALIGN) madvise(data, size, MADV_HUGEPAGE);
    std::memset(data, 0, size);
    return {static_cast<char*>(data), std::free};
}
}  // namespace

Program::Program(const Kernels& kernels, Team& team, int max_tokens)
    : kernels_(kernels), team_(team), max_tokens_(max_tokens), head_deal_(team.size()), choosing_(team.size()),
      scratch_(team.size()), courses_(team.size()) {}

int Program::buffer(Kind kind, int width) {
    std::size_t padded = up(width, GROUP), bytes = kind == Kind::F32 ? 4 : 2;
    std::size_t stride = padded + 64 / bytes;  // one more cache line: rows do not fall into one set
    buffers_.push_back({kind, width, stride, zeros(stride * bytes * up(max_tokens_, 8))});
    return static_cast<int>(buffers_.size()) - 1;
}

// ---- recording ----

void Program::embed(const bf16* table, int width, int to) {
    Op op{What::EMBED};
    op.table = table, op.width = width, op.to = to;
    ops_.push_back(op);
}

void Program::embed_packed(const Weight& weight, int to) {
    Op op{What::EMBED};
    op.weight = weight, op.width = weight.k, op.to = to;
    ops_.push_back(op);
}

void Program::rms_norm(int from, const float* weight, int width, float eps, int to) {
    Op op{What::NORM};
    op.from = from, op.to = to, op.gamma = weight, op.width = width, op.eps = eps;
    ops_.push_back(op);
}

void Program::record_linear(What what, const Weight& weight, int from, int to) {
    Op op{what};
    op.weight = weight, op.from = from, op.to = to;
    if (wants_ints(weight)) op.ints = quantized(weight, from);
    ops_.push_back(op);
}
void Program::linear(const Weight& weight, int from, int to) { record_linear(What::LINEAR, weight, from, to); }
void Program::linear_add(const Weight& weight, int from, int to) { record_linear(What::LINEAR_ADD, weight, from, to); }
void Program::linear_silu_mul(const Weight& weight, int from, int to) { record_linear(What::LINEAR_SILU_MUL, weight, from, to); }

int Program::ints_for(int width) {
    std::size_t stride = up(width, GROUP) + 64, groups = up(width, GROUP) / GROUP;
    Ints ints{stride, zeros(stride * max_tokens_), std::vector<float>(max_tokens_), std::vector<std::int32_t>(max_tokens_ * groups), groups};
    ints_.push_back(std::move(ints));
    return static_cast<int>(ints_.size()) - 1;
}

// The int8 form of a bf16 buffer, made by an operation that is recorded before the linear that reads it, and anew behind
// an ATTEND, where rows may be others.
int Program::quantized(const Weight& weight, int from) {
    auto found = ints_of_.find(weight.k);
    if (found == ints_of_.end()) found = ints_of_.emplace(weight.k, ints_for(weight.k)).first;
    for (auto op = ops_.rbegin(); op != ops_.rend() && op->to != from && op->what != What::ATTEND; ++op)
        if (op->what == What::QUANTIZE && op->ints == found->second) {
            if (op->from == from && op->rotation == weight.rotation) return op->ints;
            break;  // what the integers were before
        }
    Op op{What::QUANTIZE};
    op.from = from, op.ints = found->second, op.width = weight.k, op.rotation = weight.rotation;
    ops_.push_back(op);
    return op.ints;
}

void Program::quantize(const bf16* row, int width, int rotation, Ints& to, int at, int member) {
    if (rotation) {
        bf16* rotated = reinterpret_cast<bf16*>(scratch(member, sizeof(bf16) * width));
        kernels_.rotate(row, width, rotation, rotated);
        row = rotated;
    }
    to.scale[at] = kernels_.quantize(row, width, reinterpret_cast<std::int8_t*>(to.data.get()) + at * to.stride,
                                     to.sums.data() + at * to.sums_stride);
}

void Program::heads(int qkv, int num_heads, const Pool& pool, const float* q_norm, const float* k_norm, float eps,
                    const float* cos, const float* sin, int rotary, int num_positions) {
    Op op{What::HEADS};
    op.from = qkv, op.num_heads = num_heads, op.pool = pool, op.q_norm = q_norm, op.k_norm = k_norm, op.eps = eps;
    op.cos = cos, op.sin = sin, op.rotary = rotary;
    num_positions_ = std::min(num_positions_, num_positions);
    ops_.push_back(op);
}

void Program::attend(int qkv, int num_heads, const Pool& pool, float scale, int to) {
    Op op{What::ATTEND};
    op.from = qkv, op.num_heads = num_heads, op.pool = pool, op.scale = scale, op.to = to;
    ops_.push_back(op);
}

// ---- running ----

int Program::columns_per_unit(const Weight& weight) const {
    // Wide units read activations less often; every member should still get several.
    for (int columns = kernels_.max_columns; columns > 32; columns /= 2)
        if (weight.n_pad / columns >= 3 * team_.size()) return columns;
    return 32;
}

char* Program::scratch(int member, std::size_t bytes) {
    auto& own = scratch_[member];
    if (own.size() < bytes + 64) own.resize(bytes + 64);
    return reinterpret_cast<char*>(up(reinterpret_cast<std::uintptr_t>(own.data()), 64));
}

Rows Program::input(const Op& op) const {
    if (op.ints < 0) {
        const Buffer& buffer = buffers_[op.from];
        return {buffer.data.get(), buffer.stride, nullptr, nullptr, 0};
    }
    const Ints& ints = ints_[op.ints];
    return {ints.data.get(), ints.stride, ints.scale.data(), ints.sums.data(), ints.sums_stride};
}

void Program::run_heads(const Batch& batch, const Op& op, const Run& run, int head) {
    const Pool& pool = op.pool;
    const Buffer& qkv = buffers_[op.from];
    int group = op.num_heads / pool.num_kv_heads, dim = pool.head_dim;
    std::size_t half = op.rotary / 2;
    for (int t = 0; t < run.num_tokens; t++) {
        const float *cos = op.cos + (run.position + t) * half, *sin = op.sin + (run.position + t) * half;
        bf16* heads = qkv.half(run.token + t);
        for (int g = 0; g < group; g++)
            kernels_.rope(heads + (head * group + g) * dim, op.q_norm, op.eps, cos, sin, dim, op.rotary);
        kernels_.rope(heads + (op.num_heads + head) * dim, op.k_norm, op.eps, cos, sin, dim, op.rotary);
    }
    const bf16* k = qkv.half(run.token) + (op.num_heads + head) * dim;
    std::int32_t block = batch.tables[pool.group][run.row * batch.table_width[pool.group] + run.position / KV_BLOCK];
    std::size_t head_bytes = pool.block_bytes / 2 / pool.num_kv_heads;
    char *keys = pool.data + block * pool.block_bytes + head * head_bytes, *values = keys + pool.block_bytes / 2;
    int offset = run.position % KV_BLOCK;
    if (offset == 0 && run.num_tokens < KV_BLOCK)  // whoever had the block may have left a NaN, and 0 * NaN is one
        std::memset(keys, 0, head_bytes), std::memset(values, 0, head_bytes);
    kernels_.write_kv(pool.format, k, k + pool.num_kv_heads * dim, qkv.stride, run.num_tokens, keys, values, offset, dim);
}

int Program::units(const Op& op) const {
    switch (op.what) {
        case What::LINEAR:
        case What::LINEAR_ADD:
        case What::LINEAR_SILU_MUL: {
            int columns = columns_per_unit(op.weight);
            return (op.weight.n_pad + columns - 1) / columns;
        }
        case What::HEADS:
            return static_cast<int>(runs_.size()) * op.pool.num_kv_heads;
        case What::ATTEND:
            return static_cast<int>(attention_.at({op.pool.group, op.narrows}).tasks.size());
        default:
            return op.num_rows;
    }
}

void Program::perform(const Op& op, const Batch& batch, int member, Deal& deal) {
    int exhausted = 0;
    auto each = [&](auto f) {
        for (int unit; (unit = deal.next(member, team_.size(), exhausted)) >= 0;) f(unit);
    };
    switch (op.what) {
        case What::EMBED:
            return each([&](int t) {
                float* to = buffers_[op.to].f32(t);
                std::size_t id = batch.token_ids[t];
                if (!op.table) {
                    unpack_row(op.weight, static_cast<int>(id), to);
                } else {
                    const bf16* from = op.table + id * op.width;
                    for (int i = 0; i < op.width; i++) to[i] = bf16_to_float(from[i]);
                }
            });
        case What::NORM:
            return each([&](int t) {
                kernels_.rms_norm(buffers_[op.from].f32(t), op.gamma, op.width, op.eps, buffers_[op.to].half(t));
            });
        case What::QUANTIZE:
            return each([&](int t) { quantize(buffers_[op.from].half(t), op.width, op.rotation, ints_[op.ints], t, member); });
        case What::LINEAR:
            return product(op.weight, input(op), op.num_rows, member, deal, [&](int row, int column, int width, float* c) {
                kernels_.store(buffers_[op.to].half(row) + column, c, op.weight.bias ? op.weight.bias + column : nullptr, width);
            });
        case What::LINEAR_ADD:
            return product(op.weight, input(op), op.num_rows, member, deal, [&](int row, int column, int width, float* c) {
                kernels_.add(buffers_[op.to].f32(row) + column, c, op.weight.bias ? op.weight.bias + column : nullptr, width);
            });
        case What::LINEAR_SILU_MUL:
            return product(op.weight, input(op), op.num_rows, member, deal, [&](int row, int column, int width, float* c) {
                if (op.weight.bias)
                    for (int i = 0; i < width; i++) c[i] += op.weight.bias[column + i];
                bf16* to = buffers_[op.to].half(row) + column / 2;
                for (int i = 0; i < width; i += 32) kernels_.silu_mul(c + i, c + i + 16, 16, to + i / 2);
            });
        case What::HEADS:
            return each([&](int unit) {
                run_heads(batch, op, runs_[unit / op.pool.num_kv_heads], unit % op.pool.num_kv_heads);
            });
        case What::ATTEND:
            attend_tasks(batch, op, member, deal);
            if (plan_of(op).num_spans > 1) {
                team_.meet();
                merge_spans(op, member);
            }
            if (op.narrows) {
                team_.meet();  // queries may be among what is gathered
                gather_outputs(batch, member);
            }
            return;
    }
}

void Program::run(const Batch& batch, StepWords& words) {
    if (batch.num_tokens > max_tokens_) throw std::invalid_argument("more tokens than the program has room for");
    runs_.clear();
    for (int r = 0; r < batch.num_rows; r++)
        for (int t = static_cast<int>(batch.query_start[r]), end = static_cast<int>(batch.query_start[r + 1]), num; t < end; t += num) {
            int position = static_cast<int>(batch.positions[t]);
            num = std::min(KV_BLOCK - position % KV_BLOCK, end - t);
            if (position + num > num_positions_) throw std::invalid_argument("a position that the tables of cos and sin do not have");
            runs_.push_back({r, t, position, num});
        }
    for (auto& [key, plan] : attention_) plan.tasks.clear();
    if (deals_.size() != ops_.size()) end_recording();
    if (batch.outputs) check_outputs(batch);
    for (std::size_t i = 0; i < ops_.size(); i++) {
        Op& op = ops_[i];
        bool behind = batch.outputs && static_cast<int>(i) >= last_attend_;
        op.num_rows = behind ? batch.num_outputs : batch.num_tokens;
        op.narrows = behind && op.what == What::ATTEND;
        if (op.what == What::ATTEND && plan_of(op).tasks.empty()) plan_attention(batch, op);
        deals_[i].reset(units(op));
    }
    team_.run([&](int member) {
        double begin = now();
        for (std::size_t i = 0; i < ops_.size(); i++) {
            if (words.awaits() && ops_[i].what == What::ATTEND) {
                if (member == 0) words.await(ops_[i].pool.layer);
                team_.meet();
            }
            perform(ops_[i], batch, member, deals_[i]);
            team_.meet();
            if (member == 0) {
                if (ops_[i].what == What::HEADS) words.written(ops_[i].pool.layer);
                double end = now();
                ops_[i].seconds += end - begin;
                begin = end;
            }
        }
    });
}

void Program::read(int buffer, int num_rows, bf16* out) const {
    const Buffer& from = buffers_[buffer];
    for (int i = 0; i < num_rows; i++) std::memcpy(out + static_cast<std::size_t>(i) * from.width, from.half(i), from.width * sizeof(bf16));
}

std::vector<std::pair<std::string, double>> Program::seconds() const {
    static const char* const NAMES[] = {"embed", "norm", "linear", "linear_add", "linear_silu_mul", "heads", "attend", "quantize"};
    std::vector<std::pair<std::string, double>> found;
    for (const Op& op : ops_) found.emplace_back(NAMES[static_cast<int>(op.what)], op.seconds);
    found.emplace_back("head and choice", choosing_seconds_);
    return found;
}

void Program::clear_seconds() {
    for (Op& op : ops_) op.seconds = 0;
    choosing_seconds_ = 0;
}

}  // namespace penstock
