// The ops around linear.h and dense.h: names, inputs, and how they are read.
#pragma once

#include <functional>

#include "context.h"
#include "dense.h"
#include "linear.h"

namespace vlrt {

// How weights are stored: what the inputs of a part begin with, before perhaps a bias.
enum class Stored {
  kFloat,    // weight (float [K, N])
  kInt8,     // weight (int8 [K, N]), scale
  kFourBit,  // codes, scales, zeros as FourBitMatrix has them, scale; attributes k, n_0, n_1, ...
};

struct Format {
  Stored stored;
  const char* prefix;  // of the names of its ops
  int num_constants;   // inputs of a part that are constants of the graph
  bool scaled;         // whether a scale [N] follows them
};

constexpr Format kFloatFormat = {Stored::kFloat, "Float", 1, false};
constexpr Format kInt8Format = {Stored::kInt8, "Quantized", 1, true};
constexpr Format kFourBitFormat = {Stored::kFourBit, "FourBit", 3, true};

// Inputs: x, perhaps the weight of a norm, then those of each part, then perhaps a residual.
struct LinearVariant {
  std::size_t num_of_part(const Format& format) const {
    return static_cast<std::size_t>(format.num_constants) + (format.scaled ? 1 : 0) + (bias ? 1 : 0);
  }
  std::size_t num_inputs(const Format& format) const {
    return first_of(num_parts, format) + (residual ? 1 : 0);
  }
  std::size_t first_of(int part, const Format& format) const {
    return (norm ? 2 : 1) + static_cast<std::size_t>(part) * num_of_part(format);
  }
  std::size_t num_outputs() const { return gated ? 1 : static_cast<std::size_t>(num_parts); }

  const char* name;  // behind the prefix
  int num_parts;
  bool bias, gated, residual;
  bool norm = false;  // of x, with the attribute eps: never of floats
  bool down = false;  // the third part reads what is gated, and x is added
};

constexpr LinearVariant kLinearVariants[] = {
    {"Linear", 1, false, false, false},  {"LinearBias", 1, true, false, false},
    {"LinearAdd", 1, false, false, true}, {"LinearBiasAdd", 1, true, false, true},
    {"Projections", 3, true, false, false}, {"SwiGLU", 2, false, true, false},
    {"SwiGLUBias", 2, true, true, false},
    {"NormProjections", 3, true, false, false, true},
    {"MLP", 3, false, true, false, true, true}, {"MLPBias", 3, true, true, false, true, true},
};

// Types of an op's inputs.
std::vector<ONNXTensorElementDataType> linear_inputs(const LinearVariant& variant, const Format& format);

// One op of a graph: its weights are constants of the graph, packed once.
class LinearKernel : public Kernel {
 public:
  LinearKernel(const LinearVariant& variant, const LinearLevel& level, const OrtKernelInfo* info, const Format& format);
  LinearKernel(const LinearVariant& variant, const DenseLevel& level, const OrtKernelInfo* info);
  void run(OrtKernelContext* context) override;

 private:
  const LinearVariant& variant_;
  const Format& format_;
  std::int64_t k_ = 0;
  float eps_ = 0;
  std::vector<std::int64_t> widths_;
  std::function<void(const Linear&, const Parallel&, const Scratch&)> multiply_;
};

}  // namespace vlrt
