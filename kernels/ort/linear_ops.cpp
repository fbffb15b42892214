#include "linear_ops.h"

namespace vlrt {

LinearKernel::LinearKernel(const LinearVariant& variant, const LinearLevel& level, const OrtKernelInfo* info)
    : variant_(variant), level_(level) {
  std::vector<Matrix> matrices;
  for (std::size_t i = 0; i < variant.num_inputs(); ++i) {
    if (!variant.is_weight(i)) continue;
    const OrtValue* value = nullptr;
    int constant = 0;
    check(api->KernelInfoGetConstantInput_tensor(info, i, &constant, &value));
    if (constant == 0) throw std::runtime_error("weights must be constants of the graph");
    std::vector<std::int64_t> shape;
    const auto* q = read<std::int8_t>(value, &shape);
    if (shape.size() != 2) throw std::runtime_error("a weight is " + text(shape) + ", expected [K, N]");
    matrices.push_back({q, shape[0], shape[1]});
  }
  if (variant.gated && (matrices[0].k != matrices[1].k || matrices[0].n != matrices[1].n))
    throw std::runtime_error("a gated pair has widths " + std::to_string(matrices[0].n) + " and " +
                             std::to_string(matrices[1].n));
  weights_ = pack_weights(matrices, variant.gated, level);
}

void LinearKernel::run(OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> x, shape;
  Linear op{};
  std::size_t input = 0;
  op.x = context.input<float>(input++, &x);
  if (x.empty() || x.back() < 1 || x.back() > 1 << 16)  // sums of more would leave 32 bits
    throw std::runtime_error("x is " + text(x) + "; accepted: a last dimension of 1 to 65536");
  op.k = x.back(), op.m = 1, op.num_parts = variant_.num_parts, op.gated = variant_.gated;
  for (std::size_t i = 0; i + 1 < x.size(); ++i) op.m *= x[i];
  std::vector<std::int64_t> out = x;
  for (int p = 0; p < op.num_parts; ++p) {
    LinearPart& part = op.parts[p];
    part.weight = &weights_[static_cast<std::size_t>(p)];
    const std::int64_t n = part.weight->n;
    if (part.weight->k != op.k)
      throw std::runtime_error("a weight is " + text({part.weight->k, n}) + " where x is " + text(x));
    ++input;
    part.scale = context.input<float>(input++, &shape);
    require("scale", shape, {n});
    if (variant_.bias) {
      part.bias = context.input<float>(input++, &shape);
      require("bias", shape, {n});
    }
    out.back() = n;
    if (!op.gated || p == 0) part.out = context.output(static_cast<std::size_t>(p), out);
  }
  if (variant_.residual) {
    op.residual = context.input<float>(input, &shape);
    require("residual", shape, out);
  }
  linear(op, level_, context.parallel(), context.scratch());
}

}  // namespace vlrt
