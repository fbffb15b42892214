#include <cstring>
#include <vector>

#include "attention.h"

namespace vlrt {
namespace {

constexpr std::int64_t kTokens = 64;  // rotated by one task

struct Piece {
  std::int64_t lo, hi;       // queries
  std::int64_t first, last;  // of the segment
};

std::vector<Piece> cut(const SegmentAttention& op, const Level& level) {
  std::vector<Piece> pieces;
  for (std::int64_t s = 0; s < op.num_segments; ++s) {
    const std::int64_t first = op.cu_seqlens[s], last = op.cu_seqlens[s + 1];
    if (first == last) continue;
    const Tiling tiling(last - first, level);
    for (std::int64_t i = 0; i < tiling.tiles; ++i)
      pieces.push_back({first + tiling.lo(i), first + tiling.hi(i), first, last});
  }
  return pieces;
}

// Keys rotated and values, both [H, N, D]: every query of a segment reads them, and rows that lie together are faster.
void gather(const SegmentAttention& op, const Level& level, std::int64_t first, float* keys, float* values) {
  const std::int64_t last = first + kTokens < op.num_tokens ? first + kTokens : op.num_tokens;
  const std::int64_t dim = op.head_dim;
  for (std::int64_t n = first; n < last; ++n)
    for (std::int64_t h = 0; h < op.num_heads; ++h) {
      const std::int64_t from = (n * op.num_heads + h) * dim, to = (h * op.num_tokens + n) * dim;
      level.rotate(op.k + from, op.cos + n * dim / 2, op.sin + n * dim / 2, static_cast<int>(dim), keys + to);
      std::memcpy(values + to, op.v + from, sizeof(float) * dim);
    }
}

void attend(const SegmentAttention& op, const Level& level, const Piece& piece, std::int64_t head, const float* keys,
            const float* values) {
  const std::int64_t dim = op.head_dim;
  const float *q[kMaxRows], *cos[kMaxRows], *sin[kMaxRows];
  float* out[kMaxRows];
  std::int64_t limit[kMaxRows];
  const int num_rows = static_cast<int>(piece.hi - piece.lo);
  for (int r = 0; r < num_rows; ++r) {
    const std::int64_t n = piece.lo + r;
    q[r] = op.q + (n * op.num_heads + head) * dim;
    out[r] = op.out + (n * op.num_heads + head) * dim;
    cos[r] = op.cos + n * dim / 2;
    sin[r] = op.sin + n * dim / 2;
    limit[r] = piece.last;
  }
  const std::int64_t offset = head * op.num_tokens * dim;
  level.attend({q, cos, sin, limit, num_rows, static_cast<int>(dim), keys + offset, values + offset, piece.first,
                piece.last, out, nullptr, nullptr});
}

}  // namespace

void segment_attention(const SegmentAttention& op, const Level& level, const Parallel& parallel,
                       const Scratch& scratch) {
  if (op.num_tokens == 0) return;
  float* keys = scratch(op.num_tokens * op.num_heads * op.head_dim);
  float* values = scratch(op.num_tokens * op.num_heads * op.head_dim);
  parallel((op.num_tokens + kTokens - 1) / kTokens,
           [&](std::size_t task) { gather(op, level, static_cast<std::int64_t>(task) * kTokens, keys, values); });
  const std::vector<Piece> pieces = cut(op, level);
  parallel(pieces.size() * op.num_heads, [&](std::size_t task) {
    // Tasks that follow each other share a segment and a head, hence its keys in the cache.
    const std::size_t head = task % op.num_heads;
    attend(op, level, pieces[task / op.num_heads], static_cast<std::int64_t>(head), keys, values);
  });
}

}  // namespace vlrt
