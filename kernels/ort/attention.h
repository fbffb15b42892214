// The attention ops on plain arrays: what is a tile, and which thread does it. Formulas: kernels/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "tile.h"

namespace vlrt {

// Calls a function for 0 .. count, in any order, on as many threads as the caller lends.
using Parallel = std::function<void(std::size_t count, const std::function<void(std::size_t)>&)>;
// Returns memory for that many floats, aligned to 64 bytes, that stays until the op is done.
using Scratch = std::function<float*(std::size_t count)>;

struct VideoAttention {
  std::int64_t batch, num_new, num_heads, num_kv_heads, head_dim, num_slots, past_length;
  const float* q;     // [B, S, H, D]
  const float* k;     // [B, S, H_kv, D]
  const float* v;     // [B, S, H_kv, D]
  const float* cos;   // [M, D/2]
  const float* sin;   // [M, D/2]
  const float* bias;  // [S, past_length + S], added to the scores of all heads; null: nothing
  float* k_cache;     // [B, H_kv, M, D], slots below past_length are filled
  float* v_cache;     // [B, H_kv, M, D]
  float* out;         // [B, S, H, D]
};

struct SegmentAttention {
  std::int64_t num_tokens, num_heads, head_dim, num_segments;
  const float* q;                  // [N, H, D]
  const float* k;                  // [N, H, D]
  const float* v;                  // [N, H, D]
  const float* cos;                // [N, D/2]
  const float* sin;                // [N, D/2]
  const std::int32_t* cu_seqlens;  // [num_segments + 1], from 0 to N, never decreasing
  float* out;                      // [N, H, D]
};

void video_attention(const VideoAttention& op, const Level& level, const Parallel& parallel, const Scratch& scratch);
void segment_attention(const SegmentAttention& op, const Level& level, const Parallel& parallel,
                       const Scratch& scratch);

constexpr int kMaxRows = 48;               // of a tile, at any level
constexpr std::int64_t kManyQueries = 64;  // rows per key head from which on a level's Bf16 pays

// Rows lo .. hi of tile `index` where `count` rows are dealt to the fewest tiles, each of whole vectors but the last.
struct Tiling {
  Tiling(std::int64_t count, int lanes, int rows)
      : count(count),
        lanes(lanes),
        vectors((count + lanes - 1) / lanes),
        tiles((vectors * lanes + rows - 1) / rows) {}

  std::int64_t lo(std::int64_t index) const { return vectors * index / tiles * lanes; }
  std::int64_t hi(std::int64_t index) const { return index + 1 == tiles ? count : lo(index + 1); }

  std::int64_t count, lanes, vectors, tiles;
};

}  // namespace vlrt
