// One tile of attention: a few query rows against a range of keys of one head. Each SIMD level has its own.
//
// Only plain types cross this interface: a level is compiled with flags of its own, and an inline function of a
// standard header that was compiled with them could be the one that the linker keeps for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlrt {

constexpr int kMaxHeadDim = 256;

// Query rows [num_rows] and the keys first .. last of one head. Pointers to rows, because a tile mixes positions and
// heads.
struct Tile {
  const float* const* q;    // rows [D], not yet rotated
  const float* const* cos;  // rows [D/2]
  const float* const* sin;
  const std::int64_t* limit;  // keys from this one on are hidden from the row; never decreases from row to row
  const float* const* bias;   // rows [limit], added to scores; null: nothing
  int num_rows;
  int head_dim;
  const float* keys;    // [last, D], rotated
  const float* values;  // [last, D], rows value_stride apart
  std::int64_t value_stride;
  const std::uint16_t* packed;  // in place of these three for Bf16: blocks of kBlock keys; `first` begins one
  std::int64_t first;
  std::int64_t last;
  float* const* out;  // rows [D]
  float* maximum;     // [num_rows], with `sum` for merging parts of one row; null: `out` is normalised
  float* sum;
};

constexpr int kBlock = 32;  // keys that are packed together

// Up to kBlock keys and values of one head.
struct Keys {
  const float* keys;  // rows [D], rotated
  std::int64_t key_stride;
  const float* values;  // rows [D]
  std::int64_t value_stride;
  const float* shift;  // [D], taken from every key; null: nothing
  int count;
  int head_dim;
};

// Returns how many elements a packed block has: D is padded to whole products.
constexpr std::int64_t packed_size(std::int64_t head_dim) { return 2 * kBlock * ((head_dim + 31) / 32 * 32); }

// Tiles with products in bf16 and sums in fp32. Pays where many queries read what was packed.
struct Bf16 {
  int rows;  // of the largest tile
  void (*pack)(const Keys& from, std::uint16_t* to);
  void (*attend)(const Tile& tile);
};

struct Level {
  const char* name;
  int lanes;  // rows of a vector
  int rows;   // of the largest tile
  void (*attend)(const Tile& tile);
  // out [D] = x [D] turned by the row cos, sin [D/2].
  void (*rotate)(const float* x, const float* cos, const float* sin, int head_dim, float* out);
  void (*exp2)(const float* x, float* out, std::size_t count);
  // out [rows, columns] = x w^T: rows of x [rows, k], w [columns, k] and out are ldx, ldw and ldo apart.
  void (*dots)(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t k, const float* w, std::int64_t ldw,
               std::int64_t columns, float* out, std::int64_t ldo);
  // out [columns] = weights [rows] x: rows of x [rows, columns] are ldx apart.
  void (*weigh)(const float* weights, std::int64_t rows, const float* x, std::int64_t ldx, std::int64_t columns,
                float* out);
  // See resample.inc.
  void (*blend)(const std::uint8_t* const* rows, const float* weights, int count, std::int64_t n, float* out);
  void (*gather)(const float* row, const std::int64_t* first, const float* weights, int count, std::int64_t columns,
                 std::uint8_t* out);
  const Bf16* bf16 = nullptr;  // null: fp32 for any number of queries
};

extern const Level kPlain;
#if defined(__x86_64__)
extern const Level kAvx2;
extern const Level kAvx512;
extern const Bf16 kAmxBf16;
#endif

// Whether the processor has tiles of bf16, and the system lends them.
bool has_amx_bf16();

// Returns the level of that name; null where this processor does not have it. "auto" is the best one in fp32,
// "auto-bf16" the best one.
const Level* find_level(const char* name);

}  // namespace vlrt
