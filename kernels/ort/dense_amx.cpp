// x86 with AVX-512 and AMX's bf16 tiles: see dense.h.
#include <immintrin.h>

#include "dense.h"

#define VLRT_LANES 16

namespace vlrt {
namespace {

#include "lanes.inc"

constexpr int kFew = 16;        // rows
constexpr int kAhead = 2048;    // bytes that are fetched before they are read
constexpr int kTile = 512;      // elements
constexpr int kPlane = 2 * kTile;

// What ldtilecfg reads: tiles of 16 rows of 64 bytes. Constant, since GCC 12 drops stores that only it would read.
struct TileShapes {
  unsigned char palette, start_row, reserved[14];
  unsigned short bytes[16];
  unsigned char rows[16];
};
alignas(64) constexpr TileShapes kShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kShapes); }

void end() { _tile_release(); }

Ints bits(Reals v) { return _mm512_castps_si512(v); }
Ints upper(Reals v) { return _mm512_srli_epi32(bits(v), 16); }  // a bf16 of the first eight bits of each, cut off

// What the upper halves leave: exact, since they share sign and exponent's place with the whole.
Reals rest(Reals v) { return _mm512_sub_ps(v, _mm512_castsi512_ps(both(bits(v), all(-65536)))); }

// 32 floats in PLANES of bf16, one plane after the other: cut off three times, or rounded once.
template <int PLANES>
inline void split(Reals low, Reals high, std::uint16_t* to) {
  if (PLANES == 1) {
    store(to, (Ints)_mm512_cvtne2ps_pbh(high, low));
    return;
  }
  Reals v[2] = {low, high};
  for (int plane = 0; plane < PLANES; ++plane)
    for (int j = 0; j < 2; ++j) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + plane * kPlane + 16 * j), _mm512_cvtepi32_epi16(upper(v[j])));
      v[j] = rest(v[j]);
    }
}

template <int PLANES>
void split_rows(const float* x, std::int64_t ld, int rows, std::int64_t k, std::uint16_t* planes) {
  for (int r = 0; r < 32; ++r) {
    std::uint16_t* to = planes + r / 16 * kTile + r % 16 * 32;
    for (std::int64_t i = 0; i < k; i += 32, to += PLANES * kPlane) {
      Reals v[2] = {all(0.0f), all(0.0f)};
      for (int j = 0; j < 2; ++j)
        if (r < rows && i + 16 * j < k) v[j] = load(x + r * ld + i + 16 * j, k - i - 16 * j);
      split<PLANES>(v[0], v[1], to);
    }
  }
}

// 16 columns of two rows, a pair in each of the lanes.
inline Ints pairs(Reals even, Reals odd) {
  const __m256i low = (__m256i)_mm512_cvtneps_pbh(even), high = (__m256i)_mm512_cvtneps_pbh(odd);
  return either(_mm512_cvtepu16_epi32(low), up(_mm512_cvtepu16_epi32(high), 16));
}

template <int PLANES>
void split_panel(const float* w, std::int64_t k, std::uint16_t* planes) {
  for (std::int64_t i = 0; i < k; i += 2, w += 2 * kDensePanel)
    for (int tile = 0; tile < 2; ++tile) {
      Reals even = load(w + 16 * tile), odd = load(w + kDensePanel + 16 * tile);
      std::uint16_t* to = planes + i / 32 * PLANES * kPlane + tile * kTile + i % 32 * 16;
      if (PLANES == 1) {
        store(to, pairs(even, odd));
        continue;
      }
      for (int plane = 0; plane < PLANES; ++plane, to += kPlane) {
        store(to, _mm512_mask_blend_epi16(0xaaaaaaaau, upper(even), bits(odd)));
        even = rest(even), odd = rest(odd);
      }
    }
}

// Tiles 0 to 3 are sums of 32 rows by 32 columns, 4 and 5 rows, 6 and 7 columns, each of one plane.
inline void load_rows(const std::uint16_t* a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + kTile, 64);
}

inline void load_columns(const std::uint16_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kTile, 64);
}

inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <int PLANES>
void block(const std::uint16_t* a, const std::uint16_t* b, std::int64_t k, float* acc, bool first) {
  constexpr int kBytes = 4 * kDensePanel;
  float* const lower = acc + 16 * kDensePanel;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, acc, kBytes);
    _tile_loadd(1, acc + 16, kBytes);
    _tile_loadd(2, lower, kBytes);
    _tile_loadd(3, lower + 16, kBytes);
  }
  for (std::int64_t i = 0; i < k; i += 32, a += PLANES * kPlane, b += PLANES * kPlane) {
    load_rows(a);
    if (PLANES == 1) {
      load_columns(b);
      multiply();
      continue;
    }
    load_columns(b + 2 * kPlane);
    multiply();
    load_columns(b + kPlane);
    multiply();
    load_columns(b);
    multiply();
    load_rows(a + kPlane);
    multiply();
    load_rows(a + 2 * kPlane);
    multiply();
    load_rows(a + kPlane);
    load_columns(b + kPlane);
    multiply();
  }
  _tile_stored(0, acc, kBytes);
  _tile_stored(1, acc + 16, kBytes);
  _tile_stored(2, lower, kBytes);
  _tile_stored(3, lower + 16, kBytes);
}

template <int M>
void few_rows(const float* x, std::int64_t ld, std::int64_t k, const float* w, float* acc) {
  Reals s[M][2];
  for (int m = 0; m < M; ++m) s[m][0] = s[m][1] = all(0.0f);
  for (std::int64_t i = 0; i < k; ++i, w += kDensePanel) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + 64, _MM_HINT_T0);
    const Reals left = load(w), right = load(w + 16);
    for (int m = 0; m < M; ++m) {
      const Reals value = all(x[m * ld + i]);
      s[m][0] = fma(value, left, s[m][0]), s[m][1] = fma(value, right, s[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) store(acc + m * kDensePanel, s[m][0]), store(acc + m * kDensePanel + 16, s[m][1]);
}

void few(const float* x, std::int64_t ld, int rows, std::int64_t k, const float* w, float* acc) {
  constexpr int kAtOnce = 8;  // sums that fit the registers
  for (int r = 0; r < rows; r += kAtOnce) {
    const float* at = x + r * ld;
    float* to = acc + r * kDensePanel;
    switch (rows - r) {
      case 1: few_rows<1>(at, ld, k, w, to); break;
      case 2: few_rows<2>(at, ld, k, w, to); break;
      case 3: few_rows<3>(at, ld, k, w, to); break;
      case 4: few_rows<4>(at, ld, k, w, to); break;
      case 5: few_rows<5>(at, ld, k, w, to); break;
      case 6: few_rows<6>(at, ld, k, w, to); break;
      case 7: few_rows<7>(at, ld, k, w, to); break;
      default: few_rows<kAtOnce>(at, ld, k, w, to);
    }
  }
}

void finish(const DenseEpilogue& e) {
  for (int col = 0; col < e.cols; col += kLanes) {
    const std::int64_t count = e.cols - col;
    const Reals bias = e.bias == nullptr ? all(0.0f) : load(e.bias + col, count);
    const Reals up_bias = e.up_bias == nullptr ? all(0.0f) : load(e.up_bias + col, count);
    for (int r = 0; r < e.rows; ++r) {
      const std::int64_t at = r * kDensePanel + col;
      Reals out = add(load(e.acc + at), bias);
      if (e.up_acc != nullptr) out = mul(silu(out), add(load(e.up_acc + at), up_bias));
      if (e.residual != nullptr) out = add(out, load(e.residual + r * e.ldo + col, count));
      store(e.out + r * e.ldo + col, count, out);
    }
  }
}

}  // namespace

const DenseLevel kAmxDense = {"amx_bf16x3", 3, kFew, split_rows<3>, split_panel<3>, block<3>, few, finish, begin, end};
const DenseLevel kAmxCoarse = {"amx_bf16", 1, kFew, split_rows<1>, split_panel<1>, block<1>, few, finish, begin, end};

}  // namespace vlrt
