// The ops around linear.h: names, inputs, and how they are read.
#pragma once

#include "context.h"
#include "linear.h"

namespace vlrt {

// Inputs: x, then weight (int8 [K, N], a constant), scale and perhaps bias of each part, then perhaps a residual.
struct LinearVariant {
  const char* name;
  int num_parts;
  bool bias, gated, residual;

  std::size_t num_inputs() const { return 1 + num_parts * (bias ? 3u : 2u) + (residual ? 1 : 0); }
  std::size_t num_outputs() const { return gated ? 1 : static_cast<std::size_t>(num_parts); }
  bool is_weight(std::size_t input) const {
    return input >= 1 && input < 1 + num_parts * (bias ? 3u : 2u) && (input - 1) % (bias ? 3 : 2) == 0;
  }
};

constexpr LinearVariant kLinearVariants[] = {
    {"QuantizedLinear", 1, false, false, false},  {"QuantizedLinearBias", 1, true, false, false},
    {"QuantizedLinearAdd", 1, false, false, true}, {"QuantizedLinearBiasAdd", 1, true, false, true},
    {"QuantizedProjections", 3, true, false, false}, {"QuantizedSwiGLU", 2, false, true, false},
    {"QuantizedSwiGLUBias", 2, true, true, false},
};

// One op of a graph: its weights are constants of the graph, packed once.
class LinearKernel : public Kernel {
 public:
  LinearKernel(const LinearVariant& variant, const LinearLevel& level, const OrtKernelInfo* info);
  void run(OrtKernelContext* context) override;

 private:
  const LinearVariant& variant_;
  const LinearLevel& level_;
  std::vector<PackedWeight> weights_;
};

}  // namespace vlrt
