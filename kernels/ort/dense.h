// Linear layers with fp32 weights, in fp32: y = x W + bias + residual, and the gated pair of a SwiGLU.
//
// Products of many rows go through tiles of bf16 (arXiv 1904.06376). A float is the sum of three bf16: its 24 bits,
// eight at a time. Of the nine products of two such sums six are computed and added in fp32; the others are below 2^-22
// of the whole, less than what sums of some hundred floats are rounded by. Numbers below 2^-110 lose bits, and what is
// not finite makes no number. A coarse level rounds each float to one bf16, where the rest of a model is rounded more.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace vlrt {

constexpr int kDensePanel = 32;  // columns that lie together

// A weight matrix [k, n] in panels of kDensePanel columns, zero behind n, and behind k up to a multiple of 32. Those of
// a gated pair alternate, so that both are read as one stream.
struct DenseWeight {
  const float* panel(std::int64_t index) const { return panels.as<float>() + index * apart; }

  std::int64_t k, n;
  std::int64_t apart;  // floats from one panel to the next
  Block panels;
};

// [k, n], row after row.
struct FloatMatrix {
  const float* w;
  std::int64_t k, n;
};

// Packs the matrices of one op, which are not needed any more after that.
std::vector<DenseWeight> pack_weights(const std::vector<FloatMatrix>& matrices, bool gated);

// What is made of sums [rows, kDensePanel] of some columns.
struct DenseEpilogue {
  const float* acc;
  const float* up_acc;  // of the second part of a gated pair, or null
  int rows, cols;
  const float *bias, *up_bias;  // [cols], or null
  const float* residual;        // rows ldo apart, or null
  float* out;
  std::int64_t ldo;
};

// Kernels of one instruction set. Plain types only, for the reason that tile.h gives.
struct DenseLevel {
  const char* name;
  int planes;    // of bf16 that a float becomes
  int few_rows;  // that `few` takes
  // x [rows, k], rows ld apart, rows <= 32 -> [k / 32][planes][2 tiles][16 rows][32 k] bf16, zero behind rows and k.
  void (*split_rows)(const float* x, std::int64_t ld, int rows, std::int64_t k, std::uint16_t* planes);
  // w [k, kDensePanel], k a multiple of 32 -> [k / 32][planes][2 tiles][16][16 columns][2 k] bf16.
  void (*split_panel)(const float* w, std::int64_t k, std::uint16_t* planes);
  // acc [32, kDensePanel] = a b, of split rows and a split panel; added to what is there unless `first`.
  void (*block)(const std::uint16_t* a, const std::uint16_t* b, std::int64_t k, float* acc, bool first);
  // acc [rows, kDensePanel] = x w; rows <= few_rows, ld apart.
  void (*few)(const float* x, std::int64_t ld, int rows, std::int64_t k, const float* w, float* acc);
  void (*finish)(const DenseEpilogue& epilogue);
  void (*begin)();  // before a task with blocks
  void (*end)();
};

// Returns the level of that name, or the best one that is as exact as fp32 for "auto", the best one for "auto-bf16";
// null where this processor has none.
const DenseLevel* find_dense_level(const char* name);

// `weights` are those of the parts, in their order.
void dense(const Linear& op, const std::vector<DenseWeight>& weights, const DenseLevel& level,
           const Parallel& parallel, const Scratch& scratch);

extern const DenseLevel kAmxDense, kAmxCoarse;  // where AMX is compiled

}  // namespace vlrt
