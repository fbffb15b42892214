#include <algorithm>
#include <vector>

#include "attention.h"

namespace vlrt {
namespace {

// Up to this length a segment's head is one task: its keys stay in L2 between being rotated and being read.
constexpr std::int64_t kWhole = 1024;
constexpr std::int64_t kTasks = 16;    // where there are more segments, a task takes all heads: rows lie side by side
constexpr std::int64_t kTokens = 256;  // rotated by one task where segments are longer; whole blocks

struct Segment {
  std::int64_t first, last;
  std::int64_t block;  // the first of its packed blocks
  const Bf16* bf16;    // null: products in fp32
};

// The tokens lo .. hi of a segment.
struct Piece {
  const Segment* segment;
  std::int64_t lo, hi;
};

// Keys as they are read: rotated in fp32, or packed with the values.
struct Rotated {
  float* keys;            // [H, N, D]
  std::uint16_t* packed;  // [H, num_blocks, packed_size(D)]
  std::int64_t num_blocks;
};

void rotate(const SegmentAttention& op, const Level& level, const Piece& piece, std::int64_t head,
            const Rotated& rotated) {
  const std::int64_t dim = op.head_dim, stride = op.num_heads * dim, size = packed_size(dim);
  const Segment& segment = *piece.segment;
  auto turn = [&](std::int64_t n, float* to) {
    level.rotate(op.k + n * stride + head * dim, op.cos + n * dim / 2, op.sin + n * dim / 2, static_cast<int>(dim), to);
  };
  if (segment.bf16 == nullptr) {
    for (std::int64_t n = piece.lo; n < piece.hi; ++n) turn(n, rotated.keys + (head * op.num_tokens + n) * dim);
    return;
  }
  alignas(64) float keys[kBlock * kMaxHeadDim];
  for (std::int64_t n = piece.lo; n < piece.hi; n += kBlock) {
    const auto count = static_cast<int>(std::min<std::int64_t>(kBlock, piece.hi - n));
    for (int i = 0; i < count; ++i) turn(n + i, keys + i * dim);
    const std::int64_t block = head * rotated.num_blocks + segment.block + (n - segment.first) / kBlock;
    segment.bf16->pack({keys, dim, op.v + n * stride + head * dim, stride, nullptr, count, static_cast<int>(dim)},
                       rotated.packed + block * size);
  }
}

// Rows of a head are far apart, so no hardware fetches them ahead: asks for those of a piece.
void fetch(const SegmentAttention& op, const Piece& piece, std::int64_t head) {
  for (std::int64_t n = piece.lo; n < piece.hi; ++n)
    for (std::int64_t d = 0; d < op.head_dim; d += 16) {
      const std::int64_t at = (n * op.num_heads + head) * op.head_dim + d;
      __builtin_prefetch(op.q + at, 0, 2);
      __builtin_prefetch(op.out + at, 1, 2);
    }
}

void attend(const SegmentAttention& op, const Level& level, const Piece& piece, std::int64_t head,
            const Rotated& rotated) {
  const std::int64_t dim = op.head_dim, stride = op.num_heads * dim;
  const Segment& segment = *piece.segment;
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
    limit[r] = segment.last - segment.first;
  }
  // The segment's own keys, counted from its first.
  Tile tile{};
  tile.q = q, tile.cos = cos, tile.sin = sin, tile.limit = limit, tile.out = out;
  tile.num_rows = num_rows, tile.head_dim = static_cast<int>(dim);
  tile.last = segment.last - segment.first;
  if (segment.bf16 == nullptr) {
    tile.keys = rotated.keys + (head * op.num_tokens + segment.first) * dim;
    tile.values = op.v + segment.first * stride + head * dim;
    tile.value_stride = stride;
    level.attend(tile);
  } else {
    tile.packed = rotated.packed + (head * rotated.num_blocks + segment.block) * packed_size(dim);
    segment.bf16->attend(tile);
  }
}

std::vector<Piece> queries(const Segment& segment, const Level& level) {
  const Tiling tiling(segment.last - segment.first, level.lanes,
                      segment.bf16 == nullptr ? level.rows : segment.bf16->rows);
  std::vector<Piece> pieces;
  for (std::int64_t i = 0; i < tiling.tiles; ++i)
    pieces.push_back({&segment, segment.first + tiling.lo(i), segment.first + tiling.hi(i)});
  return pieces;
}

}  // namespace

void segment_attention(const SegmentAttention& op, const Level& level, const Parallel& parallel,
                       const Scratch& scratch) {
  if (op.num_tokens == 0) return;
  std::vector<Segment> whole, divided;  // the short ones, and the long ones
  Rotated rotated{};
  bool in_fp32 = false;
  for (std::int64_t s = 0; s < op.num_segments; ++s) {
    Segment segment{op.cu_seqlens[s], op.cu_seqlens[s + 1], rotated.num_blocks, level.bf16};
    const std::int64_t length = segment.last - segment.first;
    if (length == 0) continue;
    if (length < kManyQueries) segment.bf16 = nullptr;
    if (segment.bf16 != nullptr) rotated.num_blocks += (length + kBlock - 1) / kBlock;
    in_fp32 = in_fp32 || segment.bf16 == nullptr;
    (length > kWhole ? divided : whole).push_back(segment);
  }
  if (in_fp32) rotated.keys = scratch(op.num_tokens * op.num_heads * op.head_dim);
  if (rotated.num_blocks > 0)
    rotated.packed = reinterpret_cast<std::uint16_t*>(
        scratch(op.num_heads * rotated.num_blocks * packed_size(op.head_dim) / 2));

  const std::int64_t num_whole = static_cast<std::int64_t>(whole.size());
  const std::int64_t num_groups =
      std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(num_whole, 1), 1, op.num_heads);
  parallel(num_whole * num_groups, [&](std::size_t task) {
    const Segment& segment = whole[task / num_groups];
    const std::int64_t group = static_cast<std::int64_t>(task) % num_groups;
    const std::int64_t first = op.num_heads * group / num_groups, last = op.num_heads * (group + 1) / num_groups;
    for (std::int64_t n = segment.first; n < segment.last; n += kBlock)
      for (std::int64_t head = first; head < last; ++head)
        rotate(op, level, {&segment, n, std::min(n + kBlock, segment.last)}, head, rotated);
    for (const Piece& piece : queries(segment, level))
      for (std::int64_t head = first; head < last; ++head) {
        if (head + 1 < last) fetch(op, piece, head + 1);
        attend(op, level, piece, head, rotated);
      }
  });

  std::vector<Piece> chunks, pieces;
  for (const Segment& segment : divided) {
    for (std::int64_t n = segment.first; n < segment.last; n += kTokens)
      chunks.push_back({&segment, n, std::min(n + kTokens, segment.last)});
    for (const Piece& piece : queries(segment, level)) pieces.push_back(piece);
  }
  // Neighbours share a head, hence keys in the cache.
  parallel(chunks.size() * op.num_heads, [&](std::size_t task) {
    rotate(op, level, chunks[task % chunks.size()], static_cast<std::int64_t>(task / chunks.size()), rotated);
  });
  parallel(pieces.size() * op.num_heads, [&](std::size_t task) {
    attend(op, level, pieces[task % pieces.size()], static_cast<std::int64_t>(task / pieces.size()), rotated);
  });
}

}  // namespace vlrt
