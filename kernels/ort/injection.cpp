#include "injection.h"

#include <algorithm>
#include <cmath>

namespace vlrt {
namespace {

constexpr std::int64_t kTaskBytes = 1 << 18;  // of weights, that are worth a task

// Rows of weights that are multiplied by one task.
struct Matrix {
  Matrix(const float* w, std::int64_t n, std::int64_t k, const float* x, float* out)
      : w(w), n(n), k(k), x(x), out(out), rows(std::max<std::int64_t>(kTaskBytes / (k * 4), 1)) {}

  std::size_t tasks() const { return static_cast<std::size_t>((n + rows - 1) / rows); }

  const float* w;  // [n, k]
  std::int64_t n, k;
  const float* x;  // [B L, k]
  float* out;      // [B L, n]
  std::int64_t rows;
};

class Run {
 public:
  Run(const LatentInjection& op, const Level& level, const Parallel& parallel, const Scratch& scratch)
      : op_(op), level_(level), parallel_(parallel), num_rows_(op.batch * op.num_latents) {
    const auto of = [&](std::int64_t width) { return scratch(static_cast<std::size_t>(num_rows_ * width)); };
    u_ = of(op.width), query_ = of(op.width), seen_ = of(op.width), inner_ = of(op.inner);
    scores_ = of(op.num_heads * op.num_steps);
  }

  void operator()() const {
    for (std::int64_t r = 0; r < num_rows_; ++r)
      normalise(op_.h + r * op_.width, op_.norm_in, 1.0f, u_ + r * op_.width);
    const Matrix fc1(op_.fc1, op_.inner, op_.width, u_, inner_), q_proj(op_.q_proj, op_.width, op_.width, u_, query_);
    const Matrix fc2(op_.fc2, op_.width, op_.inner, inner_, op_.z);
    parallel_(fc1.tasks() + q_proj.tasks(), [&](std::size_t task) {
      if (task < fc1.tasks()) {
        multiply(fc1, task, true);
      } else {
        multiply(q_proj, task - fc1.tasks(), false);
      }
    });
    const auto heads = static_cast<std::size_t>(op_.batch * op_.num_heads);
    parallel_(fc2.tasks() + heads, [&](std::size_t task) {
      if (task < fc2.tasks()) {
        multiply(fc2, task, false);
      } else {
        look(static_cast<std::int64_t>(task - fc2.tasks()));
      }
    });
    const float gate = std::tanh(op_.alpha);
    for (std::int64_t r = 0; r < num_rows_; ++r) {
      float* z = op_.z + r * op_.width;
      for (std::int64_t i = 0; i < op_.width; ++i) z[i] += u_[r * op_.width + i] + gate * seen_[r * op_.width + i];
      normalise(z, op_.norm_out, op_.rho, z);
    }
  }

 private:
  // out = scale RMSNorm(x)
  void normalise(const float* x, const float* weight, float scale, float* out) const {
    float squares;
    level_.dots(x, op_.width, 1, op_.width, x, op_.width, 1, &squares, 1);
    const float by = scale / std::sqrt(squares / static_cast<float>(op_.width) + op_.eps);
    for (std::int64_t i = 0; i < op_.width; ++i) out[i] = x[i] * by * weight[i];
  }

  void multiply(const Matrix& matrix, std::size_t task, bool silu) const {
    const std::int64_t first = static_cast<std::int64_t>(task) * matrix.rows;
    const std::int64_t count = std::min(matrix.rows, matrix.n - first);
    level_.dots(matrix.x, matrix.k, num_rows_, matrix.k, matrix.w + first * matrix.k, matrix.k, count,
                matrix.out + first, matrix.n);
    for (std::int64_t r = 0; silu && r < num_rows_; ++r) activate(matrix.out + r * matrix.n + first, count);
  }

  // x = x / (1 + 2^(-x log2 e))
  void activate(float* x, std::int64_t count) const {
    constexpr std::int64_t kTogether = 256;
    constexpr float kLog2e = 1.44269504f, kMost = 126.0f;
    float power[kTogether];
    for (; count > 0; x += kTogether, count -= kTogether) {
      const std::int64_t size = std::min(count, kTogether);
      for (std::int64_t i = 0; i < size; ++i) {
        const float exponent = x[i] * -kLog2e;
        power[i] = exponent > kMost ? kMost : exponent;
      }
      level_.exp2(power, power, static_cast<std::size_t>(size));
      for (std::int64_t i = 0; i < size; ++i) x[i] /= 1.0f + power[i];
    }
  }

  // Attention of one head of [B, H], by all latents of its sample.
  void look(std::int64_t index) const {
    const std::int64_t b = index / op_.num_heads, dim = op_.width / op_.num_heads, steps = op_.num_steps;
    const std::int64_t offset = index % op_.num_heads * dim, first = b * op_.num_latents * op_.width + offset;
    const std::int64_t memory = b * steps * op_.width + offset;
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(dim));  // of powers of two
    float* scores = scores_ + index * op_.num_latents * steps;
    level_.dots(query_ + first, op_.width, op_.num_latents, dim, op_.memory_k + memory, op_.width, steps, scores,
                steps);
    for (std::int64_t l = 0; l < op_.num_latents; ++l, scores += steps) {
      const float most = *std::max_element(scores, scores + steps);
      for (std::int64_t t = 0; t < steps; ++t) scores[t] = (scores[t] - most) * scale;
      level_.exp2(scores, scores, static_cast<std::size_t>(steps));
      float sum = 0;
      for (std::int64_t t = 0; t < steps; ++t) sum += scores[t];
      for (std::int64_t t = 0; t < steps; ++t) scores[t] /= sum;
      level_.weigh(scores, steps, op_.memory_v + memory, op_.width, dim, seen_ + first + l * op_.width);
    }
  }

  const LatentInjection& op_;
  const Level& level_;
  const Parallel& parallel_;
  std::int64_t num_rows_;
  float *u_, *query_, *seen_;  // [B L, C]
  float* inner_;               // [B L, I]
  float* scores_;              // [B, H, L, T]
};

}  // namespace

void latent_injection(const LatentInjection& op, const Level& level, const Parallel& parallel, const Scratch& scratch) {
  if (op.batch * op.num_latents > 0) Run(op, level, parallel, scratch)();
}

}  // namespace vlrt
