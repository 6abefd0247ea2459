// Attention of a step: which pieces there are, who reads what ahead of need, and what becomes of their results. Knows
// tasks and KV blocks; the arithmetic of a piece is `Kernels::attend`.
#include <algorithm>
#include <limits>

#include "program.hpp"

namespace penstock {

namespace {
constexpr float LOWEST = -std::numeric_limits<float>::infinity();
}  // namespace

void Program::plan_attention(const Batch& batch, const Op& op) {
    Attention& plan = plan_of(op);
    int group = op.num_heads / op.pool.num_kv_heads;
    int tile = std::max(1, kernels_.query_rows / group);
    find_queries(batch, op.narrows);
    plan.tasks.clear();
    int max_spans = 1;
    // Head by head: the next task often reads the same keys and values, of its own prompt or of a prefix that requests
    // share, and those of one head stay in the cache.
    for (int h = 0; h < op.pool.num_kv_heads; h++)
        for (const Queries& q : queries_) {
            max_spans = std::max(max_spans, (q.position + q.num_tokens + ATTENTION_SPAN - 1) / ATTENTION_SPAN);
            // The last tokens see most: they go first, so that what is left at the end is short.
            for (int t = (q.num_tokens - 1) / tile * tile; t >= 0; t -= tile)
                plan.tasks.push_back({{q.row, q.token + t, q.position + t, std::min(tile, q.num_tokens - t), q.to + t}, h, -1});
        }
    plan.num_spans = 1;
    if (max_spans > 1 && static_cast<int>(plan.tasks.size()) < 4 * team_.size()) {
        // Too few tasks for the team: each span of the context is one, and they are merged afterwards.
        std::vector<Task> whole;
        whole.swap(plan.tasks);
        plan.num_spans = max_spans;
        for (const Task& task : whole)
            for (int span = 0; span * ATTENTION_SPAN < task.position + task.num_tokens; span++) {
                plan.tasks.push_back(task);
                plan.tasks.back().span = span;
            }
        plan.partial.resize(plan.tasks.size() * tile * group * (op.pool.head_dim + 2));
    }
}

AttendPiece Program::piece_of(const Batch& batch, const Op& op, const Task& task) const {
    const Pool& pool = op.pool;
    const Buffer& qkv = buffers_[op.from];
    int group = op.num_heads / pool.num_kv_heads, dim = pool.head_dim;
    std::size_t head_bytes = pool.block_bytes / 2 / pool.num_kv_heads;
    AttendPiece piece{};
    piece.q = qkv.half(task.token) + static_cast<std::size_t>(task.head) * group * dim;
    piece.q_stride = qkv.stride;
    piece.num_tokens = task.num_tokens, piece.group = group, piece.head_dim = dim;
    piece.position = task.position, piece.window = pool.window;
    piece.blocks = batch.tables[pool.group] + task.row * batch.table_width[pool.group];
    piece.pool = pool.data + task.head * head_bytes;
    piece.block_bytes = pool.block_bytes, piece.value_bytes = pool.block_bytes / 2;
    piece.format = pool.format, piece.scale = op.scale;
    return piece;
}

// The first position that a task sees.
int Program::first_seen(const Op& op, const Task& task) {
    return op.pool.window ? std::max(0, task.position - op.pool.window + 1) : 0;
}

// KV blocks of one of its pieces.
int Program::num_blocks(const Op& op, const Task& task, int span_begin) {
    int begin = std::max(first_seen(op, task), span_begin);
    int end = std::min(task.position + task.num_tokens, span_begin + ATTENTION_SPAN);
    return std::max(0, (end + KV_BLOCK - 1) / KV_BLOCK - begin / KV_BLOCK);
}

Program::Place Program::start_of(const Op& op, int unit) {
    const std::vector<Task>& tasks = plan_of(op).tasks;
    if (unit == static_cast<int>(tasks.size())) return {unit, 0};
    const Task& task = tasks[unit];
    return {unit, task.span < 0 ? first_seen(op, task) / ATTENTION_SPAN * ATTENTION_SPAN : task.span * ATTENTION_SPAN};
}
Program::Place Program::after(const Op& op, Place place) {
    const Task& task = plan_of(op).tasks[place.unit];
    int next = place.span_begin + ATTENTION_SPAN;
    if (task.span < 0 && next < task.position + task.num_tokens) return {place.unit, next};
    return start_of(op, place.unit + 1);
}

// What is asked for while the piece at `place` is computed: as much as it reads itself, some way ahead of it. Where its
// member did not come from the piece before, nothing has been asked for yet: its own values are, then up to twice as
// much at a time, until the lead is there.
void Program::look_ahead(const Batch& batch, const Op& op, Course& course, Place place, AttendPiece& piece) {
    constexpr std::size_t LEAD_BYTES = 128 << 10;  // what a core reads in 6 us, sixty times memory's latency; of L2 little
    const Pool& pool = op.pool;
    const std::vector<Task>& tasks = plan_of(op).tasks;
    std::size_t head_bytes = pool.block_bytes / 2 / pool.num_kv_heads;
    std::size_t mine = 2 * num_blocks(op, tasks[place.unit], place.span_begin);
    if (course.now.unit != place.unit || course.now.span_begin != place.span_begin) {
        course.heads.clear();
        course.used = 0, course.asked = mine / 2, course.end = place;
    }
    if (course.used > 4096) {
        course.heads.erase(course.heads.begin(), course.heads.begin() + course.used);
        course.asked -= course.used, course.used = 0;
    }
    std::size_t wanted = course.used + mine + LEAD_BYTES / head_bytes;
    for (; course.heads.size() < wanted && course.end.unit < static_cast<int>(tasks.size()); course.end = after(op, course.end)) {
        const Task& task = tasks[course.end.unit];
        int first = std::max(first_seen(op, task), course.end.span_begin) / KV_BLOCK;
        const std::int32_t* blocks = batch.tables[pool.group] + task.row * batch.table_width[pool.group] + first;
        const char* keys = pool.data + task.head * head_bytes;
        int num = num_blocks(op, task, course.end.span_begin);
        for (const char* from : {keys, static_cast<const char*>(keys + pool.block_bytes / 2)})
            for (int b = 0; b < num; b++) course.heads.push_back(from + blocks[b] * pool.block_bytes);
    }
    std::size_t end = std::min({wanted, course.heads.size(), course.asked + 2 * mine});
    piece.ahead = course.heads.data() + course.asked;
    piece.num_ahead = static_cast<int>(end - std::min(course.asked, end));
    course.asked = std::max(course.asked, end), course.used += mine;
    course.now = after(op, place);
}

void Program::attend_tasks(const Batch& batch, const Op& op, int member, Deal& deal) {
    Attention& plan = plan_of(op);
    int group = op.num_heads / op.pool.num_kv_heads, dim = op.pool.head_dim;
    int tile = std::max(1, kernels_.query_rows / group), rows = tile * group;
    std::size_t part = static_cast<std::size_t>(rows) * (dim + 2);
    float* of_span = reinterpret_cast<float*>(scratch(member, 2 * part * sizeof(float)));
    float* merged = of_span + part;
    Course& course = courses_[member];
    course.now = {-1, 0};
    int exhausted = 0;
    for (int unit; (unit = deal.next(member, team_.size(), exhausted)) >= 0;) {
        const Task& task = plan.tasks[unit];
        AttendPiece piece = piece_of(batch, op, task);
        auto attend = [&](int span_begin) {
            piece.span_begin = span_begin, piece.span_end = span_begin + ATTENTION_SPAN;
            look_ahead(batch, op, course, {unit, span_begin}, piece);
            kernels_.attend(piece);
        };
        int used = task.num_tokens * group, first = start_of(op, unit).span_begin, end = task.position + task.num_tokens;
        if (task.span >= 0) {
            float* at = plan.partial.data() + static_cast<std::size_t>(unit) * part;
            piece.out = at, piece.max = at + rows * dim, piece.sum = piece.max + rows;
            attend(first);
            continue;
        }
        piece.out = of_span, piece.max = of_span + rows * dim, piece.sum = piece.max + rows;
        if (end <= first + ATTENTION_SPAN) {  // nothing to merge: merging one span changes no bit
            attend(first);
            finish(op, task, piece.out, piece.sum);
            continue;
        }
        float *max = merged + rows * dim, *sum = max + rows;
        std::fill(merged, merged + used * dim, 0.0f), std::fill(max, max + used, LOWEST), std::fill(sum, sum + used, 0.0f);
        for (int begin = first; begin < end; begin += ATTENTION_SPAN) {
            attend(begin);
            kernels_.merge(piece.out, piece.max, piece.sum, used, dim, merged, max, sum);
        }
        finish(op, task, merged, sum);
    }
}

void Program::merge_spans(const Op& op, int member) {
    Attention& plan = plan_of(op);
    int group = op.num_heads / op.pool.num_kv_heads, dim = op.pool.head_dim;
    int tile = std::max(1, kernels_.query_rows / group), rows = tile * group;
    std::size_t part = static_cast<std::size_t>(rows) * (dim + 2);
    float* merged = reinterpret_cast<float*>(scratch(member, part * sizeof(float)));
    float *max = merged + rows * dim, *sum = max + rows;
    int number = 0;
    for (std::size_t unit = 0; unit < plan.tasks.size();) {
        const Task& task = plan.tasks[unit];
        std::size_t end = unit + 1;
        while (end < plan.tasks.size() && plan.tasks[end].span > 0) end++;
        if (number++ % team_.size() == member) {
            int used = task.num_tokens * group;
            std::fill(merged, merged + used * dim, 0.0f), std::fill(sum, sum + used, 0.0f);
            std::fill(max, max + used, LOWEST);
            for (; unit < end; unit++) {
                const float* at = plan.partial.data() + unit * part;
                kernels_.merge(at, at + rows * dim, at + rows * dim + rows, used, dim, merged, max, sum);
            }
            finish(op, task, merged, sum);
        }
        unit = end;
    }
}

void Program::finish(const Op& op, const Task& task, const float* out, const float* sum) {
    int group = op.num_heads / op.pool.num_kv_heads, dim = op.pool.head_dim;
    for (int t = 0; t < task.num_tokens; t++)
        for (int g = 0; g < group; g++) {
            int row = t * group + g;
            bf16* to = buffers_[op.to].half(task.to + t) + (task.head * group + g) * dim;
            kernels_.finish(out + static_cast<std::size_t>(row) * dim, sum[row], dim, to);
        }
}

}  // namespace penstock
