#include <vector>

#include "attention.h"

namespace vlrt {
namespace {

// Up to this length a segment's head is one task: its keys stay in L2 between being rotated and being read.
constexpr std::int64_t kWhole = 1024;
constexpr std::int64_t kTokens = 256;  // rotated by one task where segments are longer

// keys [H, N, D] of the tokens first .. last = those of the op, rotated.
void rotate(const SegmentAttention& op, const Level& level, std::int64_t first, std::int64_t last, std::int64_t head,
            float* keys) {
  const std::int64_t dim = op.head_dim;
  for (std::int64_t n = first; n < last; ++n)
    level.rotate(op.k + (n * op.num_heads + head) * dim, op.cos + n * dim / 2, op.sin + n * dim / 2,
                 static_cast<int>(dim), keys + (head * op.num_tokens + n) * dim);
}

// The queries lo .. hi of a segment first .. last.
struct Piece {
  std::int64_t lo, hi, first, last;
};

void attend(const SegmentAttention& op, const Level& level, const Piece& piece, std::int64_t head, const float* keys) {
  const std::int64_t dim = op.head_dim, stride = op.num_heads * dim;
  const float *q[kMaxRows], *cos[kMaxRows], *sin[kMaxRows];
  float* out[kMaxRows];
  std::int64_t limit[kMaxRows];
  const int num_rows = static_cast<int>(piece.hi - piece.lo);
  for (int r = 0; r < num_rows; ++r) {
    const std::int64_t n = piece.lo + r;
    q[r] = op.q + n * stride + head * dim;
    out[r] = op.out + n * stride + head * dim;
    cos[r] = op.cos + n * dim / 2;
    sin[r] = op.sin + n * dim / 2;
    limit[r] = piece.last;
  }
  level.attend({q, cos, sin, limit, num_rows, static_cast<int>(dim), keys + head * op.num_tokens * dim,
                op.v + head * dim, stride, piece.first, piece.last, out, nullptr, nullptr});
}

}  // namespace

void segment_attention(const SegmentAttention& op, const Level& level, const Parallel& parallel,
                       const Scratch& scratch) {
  if (op.num_tokens == 0) return;
  float* keys = scratch(op.num_tokens * op.num_heads * op.head_dim);
  std::vector<Piece> whole, pieces;  // of short segments, and of long ones
  for (std::int64_t s = 0; s < op.num_segments; ++s) {
    const std::int64_t first = op.cu_seqlens[s], last = op.cu_seqlens[s + 1];
    if (last - first > kWhole) {
      const Tiling tiling(last - first, level);
      for (std::int64_t i = 0; i < tiling.tiles; ++i)
        pieces.push_back({first + tiling.lo(i), first + tiling.hi(i), first, last});
    } else if (last > first) {
      whole.push_back({first, last, first, last});
    }
  }
  parallel(whole.size() * op.num_heads, [&](std::size_t task) {
    const Piece& segment = whole[task / op.num_heads];
    const std::int64_t head = static_cast<std::int64_t>(task) % op.num_heads;
    rotate(op, level, segment.first, segment.last, head, keys);
    const Tiling tiling(segment.last - segment.first, level);
    for (std::int64_t i = 0; i < tiling.tiles; ++i)
      attend(op, level, {segment.first + tiling.lo(i), segment.first + tiling.hi(i), segment.first, segment.last}, head,
             keys);
  });
  if (pieces.empty()) return;
  const std::int64_t chunks = (op.num_tokens + kTokens - 1) / kTokens;
  parallel(chunks * op.num_heads, [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) % chunks * kTokens;
    const std::int64_t last = first + kTokens < op.num_tokens ? first + kTokens : op.num_tokens;
    rotate(op, level, first, last, static_cast<std::int64_t>(task) / chunks, keys);
  });
  const std::int64_t count = static_cast<std::int64_t>(pieces.size());
  parallel(pieces.size() * op.num_heads, [&](std::size_t task) {  // neighbours share a head, hence keys in the cache
    attend(op, level, pieces[static_cast<std::int64_t>(task) % count], static_cast<std::int64_t>(task) / count, keys);
  });
}

}  // namespace vlrt
