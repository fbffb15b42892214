// x86 with AMX: products in bf16, summed in fp32 by the tile unit; softmax in fp32 with AVX-512.
//
// A tile register holds 16 rows of 64 bytes. In A: 16 queries x 32 of D, then 16 queries x 32 keys. In B rows are pairs
// of the summed index: 16 keys x 32 of D, then 16 of D x 32 keys; keys and values are packed so, once for all queries.
//   scores  [rows, keys] of kKeys keys: 2 x 2 tiles at a time
//   softmax online (arXiv 1805.02867), in base 2: the queries are scaled by log2(e) / sqrt(D); weights become bf16
//   output  [rows, D]: rescaled where a maximum grew, then summed on in the tiles

#include <immintrin.h>

#include "tile.h"

namespace vlrt {
namespace {

#include "rows.inc"

constexpr int kLanes = 16, kStep = 32;     // kStep: of the summed index, in one product
constexpr int kElements = kLanes * kStep;  // of a tile in bf16
constexpr int kRows = 2 * kLanes;
constexpr int kBlocks = 4, kKeys = kBlocks * kBlock;  // whose scores are kept at a time
static_assert(kBlock == kStep, "weights of a block are one tile wide");

struct Work {
  alignas(64) std::uint16_t q[kRows * kMaxHeadDim];  // [rows, padded D], rotated and scaled
  alignas(64) float out[kRows * kMaxHeadDim];        // [rows, padded D], not yet normalised
  alignas(64) float scores[kRows * kKeys];           // [rows, keys]; later weights in bf16, from each row's start on
  alignas(64) float sum[kRows * kLanes];             // of weights, by lane
  alignas(64) float maximum[kRows], decay[kRows];
  std::int32_t seen[kRows];  // keys before a row's limit, counted from the tile's first
};

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Configuration kConfiguration;

inline __mmask16 lanes_below(std::int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

inline void store_bf16(std::uint16_t* out, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16(out, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

void pack(const Keys& from, std::uint16_t* to) {
  const int dim = from.head_dim, steps = (dim + kStep - 1) / kStep, padded = steps * kStep;
  alignas(64) std::uint16_t rows[kBlock * kMaxHeadDim];
  for (int k = 0; k < kBlock; ++k)
    for (int d = 0; d < padded; d += kLanes) {
      const __mmask16 lanes = k < from.count ? lanes_below(dim - d) : 0;
      __m512 key = _mm512_maskz_loadu_ps(lanes, from.keys + k * from.key_stride + d);
      if (from.shift != nullptr) key = _mm512_sub_ps(key, _mm512_maskz_loadu_ps(lanes, from.shift + d));
      store_bf16(rows + k * padded + d, 0xffff, key);
    }
  for (int group = 0; group < kBlock / kLanes; ++group)  // pairs move as one
    for (int step = 0; step < steps; ++step, to += kElements)
      transpose(reinterpret_cast<const float*>(rows + group * kLanes * padded + step * kStep), padded / 2, kLanes,
                kLanes, reinterpret_cast<float*>(to), kLanes);
  for (int d = 0; d < padded; d += kLanes)
    for (int k = 0; k < kBlock; k += 2, to += 2 * kLanes) {
      const float* value = from.values + k * from.value_stride + d;
      const __mmask16 lanes = lanes_below(dim - d);
      const __m512 even = _mm512_maskz_loadu_ps(k < from.count ? lanes : 0, value);
      const __m512 odd = _mm512_maskz_loadu_ps(k + 1 < from.count ? lanes : 0, value + from.value_stride);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
      _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// 2^x for x <= 0, within 2^-13 of it, since it becomes bf16 next; 1 at 0, 0 far below. NaN stays NaN.
// Minimax on [0, 1].
inline __m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.07706715911626816f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22764486074447632f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6951168179512024f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// out [padded] = x [D] turned by the row cos, sin [D/2], times scale.
inline void turn_query(const float* x, const float* cos, const float* sin, int dim, float scale, std::uint16_t* out) {
  const int half = dim / 2;
  const __m512 s = _mm512_set1_ps(scale);
  for (int d = 0; d < half; d += kLanes) {
    const __mmask16 lanes = lanes_below(half - d);
    const __m512 a = _mm512_maskz_loadu_ps(lanes, x + d), b = _mm512_maskz_loadu_ps(lanes, x + half + d);
    const __m512 u = _mm512_maskz_loadu_ps(lanes, cos + d), v = _mm512_maskz_loadu_ps(lanes, sin + d);
    store_bf16(out + d, lanes, _mm512_mul_ps(s, _mm512_fmsub_ps(a, u, _mm512_mul_ps(b, v))));
    store_bf16(out + half + d, lanes, _mm512_mul_ps(s, _mm512_fmadd_ps(b, u, _mm512_mul_ps(a, v))));
  }
}

// Asks for the rows of a tile at once: one after another they would be waited for.
void fetch(const Tile& tile) {
  for (int r = 0; r < tile.num_rows; ++r)
    for (int d = 0; d < tile.head_dim; d += kLanes) _mm_prefetch(tile.q[r] + d, _MM_HINT_T0);
  for (int r = 0; r < tile.num_rows; ++r)
    for (int d = 0; d < tile.head_dim; d += kLanes) __builtin_prefetch(tile.out[r] + d, 1, 2);
}

// The rows of a tile; those behind its last, up to `count`, are zeros that see what the last one sees.
void pack_queries(const Tile& tile, int count, int padded, Work& work) {
  const int dim = tile.head_dim;
  const float scale = kLog2e / __builtin_sqrtf(static_cast<float>(dim));
  const __m512i zeros = _mm512_setzero_si512();
  const std::int64_t length = tile.last - tile.first;
  for (int r = 0; r < count; ++r) {
    std::uint16_t* q = work.q + r * padded;
    for (int d = 0; d < padded; d += kStep) _mm512_store_si512(q + d, zeros);
    if (r < tile.num_rows) turn_query(tile.q[r], tile.cos[r], tile.sin[r], dim, scale, q);
    const std::int64_t seen = tile.limit[r < tile.num_rows ? r : tile.num_rows - 1] - tile.first;
    work.seen[r] = static_cast<std::int32_t>(seen < 0 ? 0 : seen < length ? seen : length);
    work.maximum[r] = kHidden;
    _mm512_store_si512(work.sum + r * kLanes, zeros);
  }
}

template <int R>
inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1) _tile_zero(3);
}

// scores [16 R, 32] of a packed block.
template <int R>
inline void score(const std::uint16_t* q, const std::uint16_t* block, int steps, float* scores) {
  const int stride = steps * kStep * 2;
  zero<R>();
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(4, q + step * kStep, stride);
    _tile_loadd(6, block + step * kElements, 64);
    _tile_loadd(7, block + (steps + step) * kElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (R > 1) {
      _tile_loadd(5, q + kLanes * steps * kStep + step * kStep, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, kKeys * 4);
  _tile_stored(1, scores + kLanes, kKeys * 4);
  if (R > 1) _tile_stored(2, scores + kLanes * kKeys, kKeys * 4);
  if (R > 1) _tile_stored(3, scores + kLanes * kKeys + kLanes, kKeys * 4);
}

// out [16 R, 32] of D, from nothing where that is the beginning, += weights [16 R, blocks * 32] x values of the blocks.
template <int R>
inline void mix(const float* weights, const std::uint16_t* values, int blocks, std::int64_t block_size, int padded,
                bool begin, float* out) {
  const int stride = padded * 4;
  if (begin) {
    zero<R>();
  } else {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + kLanes, stride);
    if (R > 1) _tile_loadd(2, out + kLanes * padded, stride);
    if (R > 1) _tile_loadd(3, out + kLanes * padded + kLanes, stride);
  }
  for (int i = 0; i < blocks; ++i) {
    _tile_loadd(4, weights + i * kLanes, kKeys * 4);
    _tile_loadd(6, values + i * block_size, 64);
    _tile_loadd(7, values + i * block_size + kElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (R > 1) {
      _tile_loadd(5, weights + kLanes * kKeys + i * kLanes, kKeys * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride);
  _tile_stored(1, out + kLanes, stride);
  if (R > 1) _tile_stored(2, out + kLanes * padded, stride);
  if (R > 1) _tile_stored(3, out + kLanes * padded + kLanes, stride);
}

// The largest of each row of x [16, 16].
inline __m512 largest(const float* x) {
  __m512 quarter[4];  // of four rows: [a b c d] of the lanes 0-3, 4-7, 8-11 and 12-15
  for (int i = 0; i < 4; ++i) {
    __m512 row[4];
    for (int j = 0; j < 4; ++j) row[j] = _mm512_load_ps(x + (4 * i + j) * kLanes);
    const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(row[0], row[1]), _mm512_unpackhi_ps(row[0], row[1]));
    const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(row[2], row[3]), _mm512_unpackhi_ps(row[2], row[3]));
    quarter[i] = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const __m512 low = _mm512_max_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x44),
                                   _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xee));
  const __m512 high = _mm512_max_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x44),
                                    _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xee));
  return _mm512_max_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// The largest of `count` scores, by lane; hides those not seen.
template <bool kMasked>
inline __m512 look(float* scores, int count, std::int32_t seen) {
  __m512 top[2] = {_mm512_set1_ps(kHidden), _mm512_set1_ps(kHidden)};
  for (int k = 0; k < count; k += 2 * kLanes)
    for (int i = 0; i < 2; ++i) {
      float* at = scores + k + i * kLanes;
      __m512 x = _mm512_load_ps(at);
      if (kMasked) {
        x = _mm512_mask_blend_ps(lanes_below(seen - k - i * kLanes), _mm512_set1_ps(kHidden), x);
        _mm512_store_ps(at, x);
      }
      top[i] = _mm512_max_ps(top[i], x);
    }
  return _mm512_max_ps(top[0], top[1]);
}

// Adds the bias of as many keys as are left, of `count`, to a row of scores.
inline void add_bias(const float* bias, std::int64_t left, int count, float* scores) {
  const __m512 hidden = _mm512_set1_ps(kHidden), base = _mm512_set1_ps(kLog2e);
  for (int k = 0; k < count && k < left; k += kLanes) {
    const __m512 more = _mm512_maskz_loadu_ps(lanes_below(left - k), bias + k);
    const __m512 sum = _mm512_fmadd_ps(more, base, _mm512_load_ps(scores + k));
    _mm512_store_ps(scores + k, _mm512_max_ps(hidden, sum));  // which is the sum where that is no number
  }
}

// Turns a row of `count` scores into weights in bf16, and adds them to `sum` by lane.
inline void weigh(float* scores, int count, float maximum, float decay, float* sum) {
  const __m512 shift = _mm512_set1_ps(maximum);
  __m512 total = _mm512_mul_ps(_mm512_load_ps(sum), _mm512_set1_ps(decay));
  auto* weights = reinterpret_cast<std::uint16_t*>(scores);
  for (int k = 0; k < count; k += 2 * kLanes) {
    const __m512 low = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + k), shift));
    const __m512 high = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + k + kLanes), shift));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
    _mm512_store_si512(weights + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  _mm512_store_ps(sum, total);
}

// Scores of `blocks` blocks become weights, and what there is so far is rescaled to them.
template <bool kMasked>
void soften(int num_rows, int first_key, int blocks, int padded, Work& work) {
  alignas(64) float tops[kLanes * kLanes];
  const int count = blocks * kBlock;
  for (int first = 0; first < num_rows; first += kLanes) {
    for (int r = 0; r < kLanes; ++r)
      _mm512_store_ps(tops + r * kLanes, look<kMasked>(work.scores + (first + r) * kKeys, count,
                                                       work.seen[first + r] - first_key));
    const __m512 before = _mm512_load_ps(work.maximum + first), now = _mm512_max_ps(before, largest(tops));
    const __mmask16 grew = _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ);
    _mm512_store_ps(work.maximum + first, now);
    _mm512_store_ps(work.decay + first, exp2_of(_mm512_sub_ps(before, now)));
    for (int rows = first_key > 0 ? grew : 0; rows != 0; rows &= rows - 1) {
      const int r = first + __builtin_ctz(rows);
      const __m512 decay = _mm512_set1_ps(work.decay[r]);
      float* out = work.out + r * padded;
      for (int d = 0; d < padded; d += kLanes)
        _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), decay));
    }
  }
  for (int r = 0; r < num_rows; ++r)
    weigh(work.scores + r * kKeys, count, work.maximum[r], work.decay[r], work.sum + r * kLanes);
}

void finish(const Tile& tile, int padded, const Work& work) {
  for (int r = 0; r < tile.num_rows; ++r) {
    const float total = _mm512_reduce_add_ps(_mm512_load_ps(work.sum + r * kLanes));
    const __m512 scale = _mm512_set1_ps(tile.maximum == nullptr ? 1.0f / total : 1.0f);
    for (int d = 0; d < tile.head_dim; d += kLanes)
      _mm512_mask_storeu_ps(tile.out[r] + d, lanes_below(tile.head_dim - d),
                            _mm512_mul_ps(_mm512_load_ps(work.out + r * padded + d), scale));
    if (tile.maximum != nullptr) {
      tile.maximum[r] = work.maximum[r];
      tile.sum[r] = total;
    }
  }
}

template <int R>
void run(const Tile& tile) {
  Work work;
  const int steps = (tile.head_dim + kStep - 1) / kStep, padded = steps * kStep;
  const std::int64_t size = packed_size(tile.head_dim);
  const int num_blocks = static_cast<int>((tile.last - tile.first + kBlock - 1) / kBlock);
  const std::uint16_t* packed = tile.packed + tile.first / kBlock * size;
  fetch(tile);
  pack_queries(tile, R * kLanes, padded, work);
  _tile_loadconfig(&kConfiguration);
  for (int first = 0; first < num_blocks; first += kBlocks) {
    const int blocks = num_blocks - first < kBlocks ? num_blocks - first : kBlocks;
    for (int i = 0; i < blocks; ++i) score<R>(work.q, packed + i * size, steps, work.scores + i * kBlock);
    if (tile.bias != nullptr)
      for (int r = 0; r < tile.num_rows; ++r)
        add_bias(tile.bias[r] + tile.first + first * kBlock, tile.limit[r] - tile.first - first * kBlock,
                 blocks * kBlock, work.scores + r * kKeys);
    const bool masked = work.seen[0] < (first + blocks) * kBlock;
    (masked ? soften<true> : soften<false>)(R * kLanes, first * kBlock, blocks, padded, work);
    const std::uint16_t* values = packed + size / 2;
    for (int d = 0; d < padded; d += 2 * kLanes, values += 2 * kElements)
      mix<R>(work.scores, values, blocks, size, padded, first == 0, work.out + d);
    packed += blocks * size;
  }
  _tile_release();
  finish(tile, padded, work);
}

void attend(const Tile& tile) { tile.num_rows <= kLanes ? run<1>(tile) : run<2>(tile); }

}  // namespace

extern const Bf16 kAmxBf16;
const Bf16 kAmxBf16 = {kRows, pack, attend};

}  // namespace vlrt
