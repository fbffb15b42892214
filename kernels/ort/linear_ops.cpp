#include "linear_ops.h"

#include <utility>

namespace vlrt {

namespace {

std::int64_t attribute(const OrtKernelInfo* info, const std::string& name) {
  std::int64_t value = 0;
  check(api->KernelInfoGetAttribute_int64(info, name.c_str(), &value));
  return value;
}

template <typename T, typename M>
M matrix(const OrtKernelInfo* info, std::size_t input) {
  std::vector<std::int64_t> shape;
  const T* values = constant<T>(info, input, &shape);
  if (shape.size() != 2) throw std::runtime_error("a weight is " + text(shape) + ", expected [K, N]");
  return {values, shape[0], shape[1]};
}

FourBitMatrix four_bit_matrix(const OrtKernelInfo* info, std::size_t input, int part, const std::string& k) {
  FourBitMatrix found{};
  found.k = attribute(info, k), found.n = attribute(info, "n_" + std::to_string(part));
  const std::int64_t groups = (found.k + kGroup - 1) / kGroup;
  std::vector<std::int64_t> shape;
  found.codes = constant<std::uint8_t>(info, input, &shape);
  require("codes", shape, {found.n, groups, kGroup / 2});
  found.scales = constant<float>(info, input + 1, &shape);
  require("scales", shape, {found.n, groups});
  found.zeros = constant<std::uint8_t>(info, input + 2, &shape);
  require("zeros", shape, {found.n, (groups + 1) / 2});
  found.scale = constant<float>(info, input + 3, &shape);
  require("scale", shape, {found.n});
  return found;
}

template <typename M>
void require_fit(const LinearVariant& variant, const std::vector<M>& matrices) {
  if (!variant.gated) return;
  if (matrices[0].k != matrices[1].k || matrices[0].n != matrices[1].n)
    throw std::runtime_error("a gated pair has widths " + std::to_string(matrices[0].n) + " and " +
                             std::to_string(matrices[1].n));
  if (variant.down && (matrices[2].k != matrices[0].n || matrices[2].n != matrices[0].k))
    throw std::runtime_error("the third weight of an MLP is " + text({matrices[2].k, matrices[2].n}) + ", expected " +
                             text({matrices[0].n, matrices[0].k}));
}

// Of all parts, in their order; those of a gated pair lie together.
template <typename M>
std::vector<PackedWeight> pack(const LinearVariant& variant, std::vector<M> matrices, const LinearLevel& level) {
  require_fit(variant, matrices);
  if (!variant.down) return pack_weights(matrices, variant.gated, level);
  const std::vector<M> last = {matrices[2]};
  matrices.pop_back();
  std::vector<PackedWeight> packed = pack_weights(matrices, true, level);
  packed.push_back(pack_weights(last, false, level)[0]);
  return packed;
}

}  // namespace

std::vector<ONNXTensorElementDataType> linear_inputs(const LinearVariant& variant, const Format& format) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  std::vector<ONNXTensorElementDataType> inputs(variant.num_inputs(format), kFloat);
  for (std::size_t p = 0; p < static_cast<std::size_t>(variant.num_parts); ++p) {
    const std::size_t first = variant.first_of(static_cast<int>(p), format);
    if (format.stored == Stored::kInt8) inputs[first] = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    if (format.stored == Stored::kFourBit) inputs[first] = inputs[first + 2] = kBytes;
  }
  return inputs;
}

LinearKernel::LinearKernel(const LinearVariant& variant, const LinearLevel& level, const OrtKernelInfo* info,
                           const Format& format)
    : variant_(variant), format_(format) {
  std::vector<Matrix> whole;
  std::vector<FourBitMatrix> halves;
  for (int p = 0; p < variant.num_parts; ++p) {
    const std::size_t input = variant.first_of(p, format);
    if (format.stored == Stored::kInt8) {
      whole.push_back(matrix<std::int8_t, Matrix>(info, input));
    } else {
      halves.push_back(four_bit_matrix(info, input, p, variant.down && p == 2 ? "n_0" : "k"));
    }
  }
  if (variant.norm) check(api->KernelInfoGetAttribute_float(info, "eps", &eps_));
  auto weights = halves.empty() ? pack(variant, whole, level) : pack(variant, halves, level);
  k_ = weights[0].k;
  for (const PackedWeight& weight : weights) widths_.push_back(weight.n);
  multiply_ = [weights = std::move(weights), &level](const Linear& op, const Parallel& parallel,
                                                     const Scratch& scratch) {
    linear(op, weights, level, parallel, scratch);
  };
}

LinearKernel::LinearKernel(const LinearVariant& variant, const DenseLevel& level, const OrtKernelInfo* info)
    : variant_(variant), format_(kFloatFormat) {
  std::vector<FloatMatrix> matrices;
  for (std::size_t p = 0; p < static_cast<std::size_t>(variant.num_parts); ++p)
    matrices.push_back(matrix<float, FloatMatrix>(info, variant.first_of(static_cast<int>(p), format_)));
  require_fit(variant, matrices);
  auto weights = pack_weights(matrices, variant.gated);
  k_ = weights[0].k;
  for (const DenseWeight& weight : weights) widths_.push_back(weight.n);
  multiply_ = [weights = std::move(weights), &level](const Linear& op, const Parallel& parallel,
                                                     const Scratch& scratch) {
    dense(op, weights, level, parallel, scratch);
  };
}

void LinearKernel::run(OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> x, shape;
  Linear op{};
  std::size_t input = 0;
  op.x = context.input<float>(input++, &x);
  if (x.empty() || x.back() < 1 || x.back() > 1 << 16)  // sums of more would leave 32 bits
    throw std::runtime_error("x is " + text(x) + "; accepted: a last dimension of 1 to 65536");
  op.k = x.back(), op.m = 1, op.num_parts = variant_.num_parts, op.gated = variant_.gated, op.down = variant_.down;
  for (std::size_t i = 0; i + 1 < x.size(); ++i) op.m *= x[i];
  std::vector<std::int64_t> out = x;
  if (op.k != k_) throw std::runtime_error("a weight is " + text({k_, widths_[0]}) + " where x is " + text(x));
  if (variant_.norm) {
    op.norm = context.input<float>(input++, &shape), op.eps = eps_;
    require("norm", shape, {op.k});
  }
  for (int p = 0; p < op.num_parts; ++p) {
    LinearPart& part = op.parts[p];
    part.n = widths_[static_cast<std::size_t>(p)];
    input += static_cast<std::size_t>(format_.num_constants);
    if (format_.scaled) {
      part.scale = context.input<float>(input++, &shape);
      require("scale", shape, {part.n});
    }
    if (variant_.bias) {
      part.bias = context.input<float>(input++, &shape);
      require("bias", shape, {part.n});
    }
    out.back() = part.n;
    if (op.down ? p == 2 : !op.gated || p == 0)
      part.out = context.output(op.down ? 0 : static_cast<std::size_t>(p), out);
  }
  if (variant_.residual) {
    op.residual = context.input<float>(input, &shape);
    require("residual", shape, out);
  }
  multiply_(op, context.parallel(), context.scratch());
}

}  // namespace vlrt
