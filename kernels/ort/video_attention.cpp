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
        bf16(op.num_new * group < kManyQueries ? nullptr : level.bf16),
        tiling(op.num_new * group, level.lanes, bf16 == nullptr ? level.rows : bf16->rows),
        num_tiles(op.batch * op.num_kv_heads * tiling.tiles) {
    const std::int64_t total = op.past_length + op.num_new;
    if (num_tiles < kTasks) parts = std::clamp<std::int64_t>(total / kPartKeys, 1, kTasks / num_tiles);
  }

  // Where the keys of a part begin, of as many as a tile sees: with a packed block.
  std::int64_t bound(std::int64_t length, std::int64_t part) const {
    return part == parts ? length : length * part / parts / kBlock * kBlock;
  }

  std::int64_t group;
  const Bf16* bf16;  // null: products in fp32
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

// The whole cache of every key head for Bf16.
struct Packed {
  std::int64_t num_blocks;  // of a key head
  std::uint16_t* blocks;    // [B, H_kv, num_blocks, packed_size(D)]
};

// mean [D] = that of the keys of a head. Softmax does not see what all keys share, and what differs is rounded less
// without it (SageAttention, arXiv 2410.02367): biases of key projections can be far larger than the rest.
void average(const VideoAttention& op, std::int64_t kv, float* mean) {
  const std::int64_t total = op.past_length + op.num_new, dim = op.head_dim;
  const float* keys = op.k_cache + kv * op.num_slots * dim;
  std::fill(mean, mean + dim, 0.0f);
  for (std::int64_t slot = 0; slot < total; ++slot)
    for (std::int64_t d = 0; d < dim; ++d) mean[d] += keys[slot * dim + d];
  for (std::int64_t d = 0; d < dim; ++d) mean[d] /= static_cast<float>(total);
}

Packed pack(const VideoAttention& op, const Bf16& bf16, const Parallel& parallel, const Scratch& scratch) {
  const std::int64_t total = op.past_length + op.num_new, dim = op.head_dim, size = packed_size(dim);
  const std::int64_t num_blocks = (total + kBlock - 1) / kBlock, count = op.batch * op.num_kv_heads * num_blocks;
  const Packed packed{num_blocks, reinterpret_cast<std::uint16_t*>(scratch(count * size / 2))};
  float* means = scratch(op.batch * op.num_kv_heads * dim);
  parallel(op.batch * op.num_kv_heads, [&](std::size_t kv) { average(op, kv, means + kv * dim); });
  parallel((count + kTokens / kBlock - 1) / (kTokens / kBlock), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * (kTokens / kBlock);
    for (std::int64_t i = first; i < std::min(first + kTokens / kBlock, count); ++i) {
      const std::int64_t slot = i % num_blocks * kBlock, offset = (i / num_blocks * op.num_slots + slot) * dim;
      const auto filled = static_cast<int>(std::min<std::int64_t>(kBlock, total - slot));
      bf16.pack({op.k_cache + offset, dim, op.v_cache + offset, dim, means + i / num_blocks * dim, filled,
                 static_cast<int>(dim)},
                packed.blocks + i * size);
    }
  });
  return packed;
}

void attend(const VideoAttention& op, const Level& level, const Plan& plan, const Packed& packed, std::int64_t task,
            const Partial& partial) {
  const std::int64_t dim = op.head_dim, part = task % plan.parts, tile = task / plan.parts;
  const std::int64_t index = tile % plan.tiling.tiles, kv = tile / plan.tiling.tiles;  // kv: of [B, H_kv]
  const std::int64_t b = kv / op.num_kv_heads, kv_head = kv % op.num_kv_heads;
  const std::int64_t lo = plan.tiling.lo(index), num_rows = plan.tiling.hi(index) - lo;
  const float *q[kMaxRows], *cos[kMaxRows], *sin[kMaxRows];
  const float* bias[kMaxRows];
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
    bias[r] = op.bias == nullptr ? nullptr : op.bias + position * (op.past_length + op.num_new);
    out[r] = plan.parts == 1 ? op.out + row : partial.out + (task * kMaxRows + r) * dim;
  }
  const std::int64_t length = op.past_length + (lo + num_rows - 1) / plan.group + 1, offset = kv * op.num_slots * dim;
  float* maximum = plan.parts == 1 ? nullptr : partial.maximum + task * kMaxRows;
  float* sum = plan.parts == 1 ? nullptr : partial.sum + task * kMaxRows;
  const Tile tile_of{q, cos, sin, limit, op.bias == nullptr ? nullptr : bias, static_cast<int>(num_rows),
                     static_cast<int>(dim), op.k_cache + offset, op.v_cache + offset, dim,
                     packed.blocks + kv * packed.num_blocks * packed_size(dim), plan.bound(length, part),
                     plan.bound(length, part + 1), out, maximum, sum};
  (plan.bf16 == nullptr ? level.attend : plan.bf16->attend)(tile_of);
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
  Packed packed{};
  if (plan.bf16 != nullptr) packed = pack(op, *plan.bf16, parallel, scratch);
  parallel(tasks, [&](std::size_t task) {  // the longest first: what is left at the end is short
    attend(op, level, plan, packed, tasks - 1 - static_cast<std::int64_t>(task), partial);
  });
  if (plan.parts > 1)
    for (std::int64_t tile = 0; tile < plan.num_tiles; ++tile) merge(op, plan, partial, tile);
}

}  // namespace vlrt
