// Linear layers with int8 weights on plain arrays: y = x W * scale + bias + residual, and the gated pair of a SwiGLU.
//
// Each row of x is quantised by its own largest magnitude: a = rint(127 x / max|x|). Integer sums are exact, so that
// every level gives the same ones. Weights are read as a bundle holds them, [K, N] row after row, and never copied as a
// whole: few rows run straight over them, many rows over panels of 64 columns that are packed when they are needed.
#pragma once

#include <cstdint>

#include "attention.h"

namespace vlrt {

constexpr int kPanel = 64;      // columns that are multiplied at once
constexpr int kBlockRows = 32;  // rows that are multiplied with a panel at once
constexpr int kFewRows = 4;     // up to so many run over weights that are not packed
constexpr int kMaxParts = 3;

// One weight matrix with its own output [M, n].
struct LinearPart {
  std::int64_t n;
  const std::int8_t* q;  // [K, n]
  const float* scale;    // [n]
  const float* bias;     // [n], or null
  float* out;            // [M, n]; null for the second part of a gated pair
};

struct Linear {
  std::int64_t m, k;
  const float* x;  // [M, K]
  int num_parts;
  LinearPart parts[kMaxParts];
  bool gated;             // two parts of one width: out = silu(part 0) * part 1
  const float* residual;  // [M, n] of a single part, or null
};

// The rows of x, quantised.
struct Rows {
  std::int8_t* a;       // [M, stride], zero behind K
  std::int64_t stride;  // bytes; a multiple of 64
  float* scale;         // [M], max|x| / 127
  std::int32_t* sum;    // [M], of a
};

// What is made of sums [rows, kPanel] of one panel, or of `ld` columns: where they go, and what joins them.
struct Epilogue {
  const std::int32_t* acc;
  const std::int32_t* up_acc;  // of the second part of a gated pair, or null
  std::int64_t ld;             // of acc
  int rows, cols;
  const float* row_scale;             // [rows]
  const float *scale, *bias;          // [cols]; bias may be null
  const float *up_scale, *up_bias;    // likewise
  const float* residual;              // rows ldo apart, or null
  float* out;
  std::int64_t ldo;
};

// Kernels of one instruction set. Plain types only, for the reason that tile.h gives.
struct LinearLevel {
  const char* name;
  // One row x [k] -> a [stride], its scale and its sum.
  void (*quantise)(const float* x, std::int64_t k, std::int64_t stride, std::int8_t* a, float* scale,
                   std::int32_t* sum);
  // acc [m, ld] = a [m, k] q [k, cols], whose rows are n apart; m <= kFewRows.
  void (*few)(const std::int8_t* a, std::int64_t stride, const std::int32_t* sum, int m, std::int64_t k,
              const std::int8_t* q, std::int64_t n, int cols, std::int32_t* acc, std::int64_t ld);
  // Panels of packed, each [steps of 4 k][kPanel][4] and `size` bytes = q [k, cols], whose rows are n apart; zero
  // elsewhere, up to a multiple of 64 k.
  void (*pack)(const std::int8_t* q, std::int64_t n, std::int64_t k, int cols, std::int8_t* packed, std::int64_t size);
  // acc [rows, kPanel] = a [rows, k] packed; rows <= kBlockRows, of which all may be read.
  void (*block)(const std::int8_t* a, std::int64_t stride, const std::int32_t* sum, int rows, std::int64_t k,
                const std::int8_t* packed, std::int32_t* acc);
  void (*finish)(const Epilogue& epilogue);
  void (*begin)();  // before the first block of a task; null: nothing to do
  void (*end)();
};

// Returns the level of that name, or the best one for null or "auto"; null where this processor has none.
const LinearLevel* find_linear_level(const char* name);

void linear(const Linear& op, const LinearLevel& level, const Parallel& parallel, const Scratch& scratch);

#if defined(__x86_64__)
extern const LinearLevel kAvxVnni;
extern const LinearLevel kAvx512Vnni;
extern const LinearLevel kAmxInt8;
#endif

}  // namespace vlrt
