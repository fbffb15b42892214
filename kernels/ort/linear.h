// Linear layers with weights of 8 or 4 bits on plain arrays: y = x W * scale + bias + residual, the gated pair of a
// SwiGLU, and a whole MLP with the norm before it.
//
// Each row of x is quantised by its own largest magnitude: a = rint(127 x / max|x|). Integer sums are exact, so that
// every level gives the same ones. Within an MLP, what is gated is rounded to bf16 until it is quantised: that is less
// than a hundredth of what quantising rounds, and half of what memory has to move. Weights are packed once, when a
// session makes its kernels, in an order of the level.
#pragma once

#include <cstdint>

#include <vector>

#include "attention.h"
#include "memory.h"

namespace vlrt {

constexpr int kPanel = 64;      // columns that lie together
constexpr int kBlockRows = 32;  // rows that are multiplied with a panel at once
constexpr int kFewRows = 16;    // up to so many memory bounds, not products
constexpr int kMaxParts = 3;
constexpr int kGroup = 32;  // k of a column that share a scale, where weights have 4 bits

// Of each file its own, for the reason that tile.h gives.
static inline std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }
static inline std::int64_t round_up(std::int64_t value, std::int64_t to) { return divide_up(value, to) * to; }

struct LinearLevel;

// A weight matrix [k, n] in panels of kPanel columns, zero behind k and n. Those of a gated pair alternate, so that
// both are read as one stream.
struct PackedWeight {
  std::int64_t padded() const { return (k + 63) / 64 * 64; }
  // Of so many columns of a panel; of 4 bits also a factor and what is taken off, a byte each per kGroup of k.
  std::int64_t bytes(std::int64_t columns) const {
    return bits == 8 ? padded() * columns : padded() * columns / 2 + padded() / kGroup * columns * 2;
  }
  const std::int8_t* panel(std::int64_t index) const { return panels.as<std::int8_t>() + index * apart; }

  std::int64_t k, n;
  int bits;            // of a weight: 8, or 4, which become 8 when they are read
  std::int64_t apart;  // bytes from one panel to the next
  Block panels;
  std::vector<std::int32_t> sum;  // [n up to a panel], of columns
};

// int8 weights [k, n], row after row.
struct Matrix {
  const std::int8_t* q;
  std::int64_t k, n;
};

// 4-bit weights as com.microsoft::MatMulNBits takes them: w[i, j] = (code - zero) * scale, of column j and the kGroup
// of k that i is in. Scales are whole multiples of one of their column, so that w / scale of the column is an int8.
struct FourBitMatrix {
  const std::uint8_t* codes;  // [n, groups, kGroup / 2], two to a byte, the even one low
  const float* scales;        // [n, groups]
  const std::uint8_t* zeros;  // [n, (groups + 1) / 2], likewise two to a byte
  const float* scale;         // [n]
  std::int64_t k, n;
};

// Packs the matrices of one op, which are not needed any more after that. Throws where scales are no such multiples.
std::vector<PackedWeight> pack_weights(const std::vector<Matrix>& matrices, bool gated, const LinearLevel& level);
std::vector<PackedWeight> pack_weights(const std::vector<FourBitMatrix>& matrices, bool gated,
                                       const LinearLevel& level);

// One weight matrix with its own output [M, n].
struct LinearPart {
  std::int64_t n;
  const float* scale;  // [n]; null where weights are floats
  const float* bias;   // [n], or null
  float* out;          // [M, n]; null for the second part of a gated pair
  std::uint16_t* coarse_out = nullptr;  // in place of it: bf16 [M, n up to a panel]
};

struct Linear {
  std::int64_t m, k;
  const float* x;  // [M, K]
  int num_parts;
  LinearPart parts[kMaxParts];
  bool gated;             // two parts of one width: out = silu(part 0) * part 1
  const float* residual;  // [M, n] of a single part, or null
  const std::uint16_t* coarse_x = nullptr;  // in place of x: bf16 [M, K up to a panel]
  const float* norm = nullptr;              // [K]: the parts read RMSNorm(x), with this weight; or null
  float eps = 0;                            // of the norm
  bool down = false;                        // of a gated pair: out = x + part 2 of what is gated
};

// A row of x.
struct Row {
  const float* x;
  const std::uint16_t* coarse;  // in place of it: bf16, with zeros or anything up to a panel
  const float* norm;
  float eps;
};

// The rows of x, quantised.
struct Rows {
  std::int8_t* a;       // [M, stride], zero behind K
  std::int64_t stride;  // bytes; a multiple of 64
  float* scale;         // [M], max|x| / 127
};

// What is made of sums [rows, ld] of some columns: where they go, and what joins them.
struct Epilogue {
  const std::int32_t* acc;
  const std::int32_t* up_acc;  // of the second part of a gated pair, or null
  int ld, rows, cols;
  const float* row_scale;           // [rows]
  const float *scale, *bias;        // [cols]; bias may be null
  const float *up_scale, *up_bias;  // likewise
  const float* residual;            // rows ldo apart, or null
  float* out;
  std::int64_t ldo;
  std::uint16_t* coarse_out;  // in place of `out`
};

// What is fetched from memory meanwhile: so many cache lines from `at` on in each step of 64 k, and the places of
// `rows` rows of the output, so many bytes of each, ldo bytes apart.
struct Ahead {
  const std::int8_t* at;
  int lines;
  const char* out;
  std::int64_t ldo;
  int rows, bytes;
};

// Kernels of one instruction set. Plain types only, for the reason that tile.h gives.
struct LinearLevel {
  const char* name;
  bool tiled;  // kBlockRows rows lie together, 64 k of each; else rows lie one after the other
  int width;   // columns that `block` takes: a panel or a part of it, which lie together
  // One row of k -> a and its scale; 64 k lie together, `step` bytes from the next.
  void (*quantise)(const Row& row, std::int64_t k, std::int8_t* a, std::int64_t step, float* scale);
  // Panels of packed, `apart` bytes from each other, = q [k, cols], whose rows are n apart; sum [cols up to a panel].
  void (*pack)(const std::int8_t* q, std::int64_t n, std::int64_t k, std::int64_t cols, std::int8_t* packed,
               std::int64_t apart, std::int32_t* sum);
  // The same of 4-bit weights, of the columns first .. first + cols; `factors` [n, groups] in place of their scales.
  void (*pack_4bit)(const FourBitMatrix& from, const std::uint8_t* factors, std::int64_t first, std::int64_t cols,
                    std::int8_t* packed, std::int64_t apart, std::int32_t* sum);
  // Packed int8 weights of `width` columns, of those of 4 bits.
  void (*unpack)(const std::int8_t* from, std::int64_t k, std::int8_t* packed);
  // acc [m, kPanel] = a [m, k] packed; m <= kFewRows, of which all may be read and written.
  void (*few)(const std::int8_t* a, std::int64_t stride, int m, std::int64_t k, const std::int8_t* packed,
              const std::int32_t* sum, std::int32_t* acc);
  // The same of packed 4-bit weights; null: they are unpacked first.
  void (*few_4bit)(const std::int8_t* a, std::int64_t k, const std::int8_t* packed, std::int32_t* acc);
  // acc [rows, width] = a [rows, k] packed; rows <= kBlockRows, of which all may be read. On the way it finishes what
  // is pending, where that is not null.
  void (*block)(const std::int8_t* a, std::int64_t stride, int rows, std::int64_t k, const std::int8_t* packed,
                const std::int32_t* sum, std::int32_t* acc, const Epilogue* pending, Ahead ahead);
  void (*finish)(const Epilogue& epilogue);
  void (*begin)();  // before a task; null: nothing to do
  void (*end)();
};

// Returns the level of that name, or the best one for null or "auto"; null where this processor has none.
const LinearLevel* find_linear_level(const char* name);

// `weights` are those of the parts, in their order.
void linear(const Linear& op, const std::vector<PackedWeight>& weights, const LinearLevel& level,
            const Parallel& parallel, const Scratch& scratch);

#if defined(__x86_64__)
extern const LinearLevel kAvxVnni;
extern const LinearLevel kAvx512Vnni;
extern const LinearLevel kAmxInt8;
#endif

}  // namespace vlrt
