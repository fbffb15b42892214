#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"

namespace vlrt {
namespace {

constexpr std::int64_t kTokens = 64;     // appended by one task
constexpr std::int64_t kPartKeys = 512;  // fewest keys that are worth a task of their own
constexpr std::int64_t kTasks = 16;      // below this many, tiles are divided by their keys too

// How queries become tasks. The rows of a tile are (position, head) pairs that share a key head, positions outermost:
// then almost no key is read that most of its rows may not see, and all heads of a group use what was loaded once.
struct Plan {
  Plan(const VideoAttention& op, const Level& level)
      : group(op.num_heads / op.num_kv_heads),
        tiling(op.num_new * group, level),
        num_tiles(op.batch * op.num_kv_heads * tiling.tiles) {
    const std::int64_t total = op.past_length + op.num_new;
    if (num_tiles < kTasks) parts = std::clamp<std::int64_t>(total / kPartKeys, 1, kTasks / num_tiles);
  }

  std::int64_t group;
  Tiling tiling;
  std::int64_t num_tiles;
  std::int64_t parts = 1;  // that the keys of a tile are divided into
};

// What a task leaves where a tile has parts: rows not yet normalised, and by what.
struct Partial {
  float* out;      // [tasks, rows, D]
  float* maximum;  // [tasks, rows]
  float* sum;      // [tasks, rows]
};

void append(const VideoAttention& op, const Level& level, std::int64_t first) {
  const std::int64_t last = std::min(first + kTokens, op.batch * op.num_new), dim = op.head_dim;
  for (std::int64_t token = first; token < last; ++token) {
    const std::int64_t b = token / op.num_new, slot = op.past_length + token % op.num_new;
    for (std::int64_t h = 0; h < op.num_kv_heads; ++h) {
      const std::int64_t from = (token * op.num_kv_heads + h) * dim;
      const std::int64_t to = ((b * op.num_kv_heads + h) * op.num_slots + slot) * dim;
      level.rotate(op.k + from, op.cos + slot * dim / 2, op.sin + slot * dim / 2, static_cast<int>(dim),
                   op.k_cache + to);
      std::memcpy(op.v_cache + to, op.v + from, sizeof(float) * dim);
    }
  }
}

void attend(const VideoAttention& op, const Level& level, const Plan& plan, std::int64_t task, const Partial& partial) {
  const std::int64_t dim = op.head_dim, part = task % plan.parts, tile = task / plan.parts;
  const std::int64_t index = tile % plan.tiling.tiles, kv = tile / plan.tiling.tiles;  // kv: of [B, H_kv]
  const std::int64_t b = kv / op.num_kv_heads, kv_head = kv % op.num_kv_heads;
  const std::int64_t lo = plan.tiling.lo(index), num_rows = plan.tiling.hi(index) - lo;
  const float *q[kMaxRows], *cos[kMaxRows], *sin[kMaxRows];
  float* out[kMaxRows];
  std::int64_t limit[kMaxRows];
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const std::int64_t position = (lo + r) / plan.group, head = kv_head * plan.group + (lo + r) % plan.group;
    const std::int64_t row = ((b * op.num_new + position) * op.num_heads + head) * dim;
    const std::int64_t slot = op.past_length + position;
    q[r] = op.q + row;
    cos[r] = op.cos + slot * dim / 2;
    sin[r] = op.sin + slot * dim / 2;
    limit[r] = slot + 1;
    out[r] = plan.parts == 1 ? op.out + row : partial.out + (task * kMaxRows + r) * dim;
  }
  const std::int64_t length = op.past_length + (lo + num_rows - 1) / plan.group + 1, offset = kv * op.num_slots * dim;
  float* maximum = plan.parts == 1 ? nullptr : partial.maximum + task * kMaxRows;
  float* sum = plan.parts == 1 ? nullptr : partial.sum + task * kMaxRows;
  level.attend({q, cos, sin, limit, static_cast<int>(num_rows), static_cast<int>(dim), op.k_cache + offset,
                op.v_cache + offset, dim, length * part / plan.parts, length * (part + 1) / plan.parts, out, maximum,
                sum});
}

void merge(const VideoAttention& op, const Plan& plan, const Partial& partial, std::int64_t tile) {
  const std::int64_t dim = op.head_dim, index = tile % plan.tiling.tiles, kv = tile / plan.tiling.tiles;
  const std::int64_t b = kv / op.num_kv_heads, kv_head = kv % op.num_kv_heads, lo = plan.tiling.lo(index);
  for (std::int64_t r = 0; r < plan.tiling.hi(index) - lo; ++r) {
    const std::int64_t position = (lo + r) / plan.group, head = kv_head * plan.group + (lo + r) % plan.group;
    float* out = op.out + ((b * op.num_new + position) * op.num_heads + head) * dim;
    const std::int64_t from = tile * plan.parts * kMaxRows + r;
    float top = partial.maximum[from], total = 0;
    for (std::int64_t p = 1; p < plan.parts; ++p) top = std::max(top, partial.maximum[from + p * kMaxRows]);
    std::fill(out, out + dim, 0.0f);
    for (std::int64_t p = 0; p < plan.parts; ++p) {
      const std::int64_t at = from + p * kMaxRows;
      const float weight = std::exp2(partial.maximum[at] - top);
      total += weight * partial.sum[at];
      for (std::int64_t d = 0; d < dim; ++d) out[d] += weight * partial.out[at * dim + d];
    }
    for (std::int64_t d = 0; d < dim; ++d) out[d] /= total;
  }
}

}  // namespace

void video_attention(const VideoAttention& op, const Level& level, const Parallel& parallel, const Scratch& scratch) {
  if (op.batch * op.num_new == 0) return;
  parallel((op.batch * op.num_new + kTokens - 1) / kTokens,
           [&](std::size_t task) { append(op, level, static_cast<std::int64_t>(task) * kTokens); });
  const Plan plan(op, level);
  const std::int64_t tasks = plan.num_tiles * plan.parts;
  Partial partial{};
  if (plan.parts > 1)
    partial = {scratch(tasks * kMaxRows * op.head_dim), scratch(tasks * kMaxRows), scratch(tasks * kMaxRows)};
  parallel(tasks, [&](std::size_t task) {  // the longest first: what is left at the end is short
    attend(op, level, plan, tasks - 1 - static_cast<std::int64_t>(task), partial);
  });
  if (plan.parts > 1)
    for (std::int64_t tile = 0; tile < plan.num_tiles; ++tile) merge(op, plan, partial, tile);
}

}  // namespace vlrt
