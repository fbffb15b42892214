#include "linear_ops.h"

namespace vlrt {

void run_linear(const LinearVariant& variant, const LinearLevel& level, OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> x, q, shape;
  Linear op{};
  std::size_t input = 0;
  op.x = context.input<float>(input++, &x);
  if (x.empty() || x.back() < 1 || x.back() > 1 << 16)  // sums of more would leave 32 bits
    throw std::runtime_error("x is " + text(x) + "; accepted: a last dimension of 1 to 65536");
  op.k = x.back(), op.m = 1, op.num_parts = variant.num_parts, op.gated = variant.gated;
  for (std::size_t i = 0; i + 1 < x.size(); ++i) op.m *= x[i];
  std::vector<std::int64_t> out = x;
  for (int p = 0; p < op.num_parts; ++p) {
    LinearPart& part = op.parts[p];
    part.q = context.input<std::int8_t>(input++, &q);
    if (q.size() != 2 || q[0] != op.k) throw std::runtime_error("a weight is " + text(q) + " where x is " + text(x));
    part.n = q[1];
    part.scale = context.input<float>(input++, &shape);
    require("scale", shape, {part.n});
    if (variant.bias) {
      part.bias = context.input<float>(input++, &shape);
      require("bias", shape, {part.n});
    }
    if (op.gated && part.n != op.parts[0].n)
      throw std::runtime_error("a gated pair has widths " + std::to_string(op.parts[0].n) + " and " +
                               std::to_string(part.n));
    out.back() = part.n;
    if (!op.gated || p == 0) part.out = context.output(static_cast<std::size_t>(p), out);
  }
  if (variant.residual) {
    op.residual = context.input<float>(input, &shape);
    require("residual", shape, out);
  }
  linear(op, level, context.parallel(), context.scratch());
}

}  // namespace vlrt
