#include <algorithm>

#include "context.h"
#include "injection.h"

namespace vlrt {
namespace {

void require_head_dim(std::int64_t dim) {
  if (dim % 2 != 0 || dim < 2 || dim > kMaxHeadDim)
    throw std::runtime_error("head dim is " + std::to_string(dim) + "; accepted: even, 2 to " +
                             std::to_string(kMaxHeadDim));
}

}  // namespace

namespace {

void attend(const Level& level, OrtKernelContext* given, bool biased) {
  Context context(given);
  std::vector<std::int64_t> q, k, v, cos, sin, k_cache, v_cache;
  VideoAttention op{};
  op.q = context.input<float>(0, &q);
  op.k = context.input<float>(1, &k);
  op.v = context.input<float>(2, &v);
  op.cos = context.input<float>(3, &cos);
  op.sin = context.input<float>(4, &sin);
  const float* past_k = context.input<float>(5, &k_cache);
  const float* past_v = context.input<float>(6, &v_cache);
  op.past_length = *context.input<std::int32_t>(7);
  if (q.size() != 4 || k.size() != 4 || k_cache.size() != 4)
    throw std::runtime_error("q, k and k_cache have other ranks than 4: " + text(q) + ", " + text(k) + ", " +
                             text(k_cache));
  op.batch = q[0], op.num_new = q[1], op.num_heads = q[2], op.head_dim = q[3];
  op.num_kv_heads = k[2], op.num_slots = k_cache[2];
  require_head_dim(op.head_dim);
  if (op.num_kv_heads < 1 || op.num_heads % op.num_kv_heads != 0)
    throw std::runtime_error(std::to_string(op.num_heads) + " heads are no multiple of " +
                             std::to_string(op.num_kv_heads));
  require("k", k, {op.batch, op.num_new, op.num_kv_heads, op.head_dim});
  require("v", v, k);
  require("cos", cos, {op.num_slots, op.head_dim / 2});
  require("sin", sin, cos);
  require("k_cache", k_cache, {op.batch, op.num_kv_heads, op.num_slots, op.head_dim});
  require("v_cache", v_cache, k_cache);
  if (op.past_length < 0 || op.past_length + op.num_new > op.num_slots)
    throw std::runtime_error("past_length is " + std::to_string(op.past_length) + " and " + std::to_string(op.num_new) +
                             " positions come, in a cache of " + std::to_string(op.num_slots) + " slots");
  if (biased) {
    std::vector<std::int64_t> shape;
    const float* bias = context.input<float>(8, &shape);
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    if (count > 0) {
      require("bias", shape, {1, 1, op.num_new, op.past_length + op.num_new});
      op.bias = bias;
    }
  }
  op.out = context.output(0, q);
  op.k_cache = context.output(1, k_cache);
  op.v_cache = context.output(2, v_cache);
  const std::int64_t count = op.batch * op.num_kv_heads * op.num_slots * op.head_dim;
  if (op.k_cache != past_k) std::copy(past_k, past_k + count, op.k_cache);  // else the caller bound both to one buffer
  if (op.v_cache != past_v) std::copy(past_v, past_v + count, op.v_cache);
  video_attention(op, level, context.parallel(), context.scratch());
}

}  // namespace

void run_video_attention(const Level& level, OrtKernelContext* context) { attend(level, context, false); }

void run_lane_attention(const Level& level, OrtKernelContext* context) { attend(level, context, true); }

void run_segment_attention(const Level& level, OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> q, k, v, cos, sin, bounds;
  SegmentAttention op{};
  op.q = context.input<float>(0, &q);
  op.k = context.input<float>(1, &k);
  op.v = context.input<float>(2, &v);
  op.cos = context.input<float>(3, &cos);
  op.sin = context.input<float>(4, &sin);
  op.cu_seqlens = context.input<std::int32_t>(5, &bounds);
  if (q.size() != 3 || bounds.size() != 1 || bounds[0] < 1)
    throw std::runtime_error("q is " + text(q) + " and cu_seqlens is " + text(bounds) +
                             ", expected [N, H, D] and [segments + 1]");
  op.num_tokens = q[0], op.num_heads = q[1], op.head_dim = q[2], op.num_segments = bounds[0] - 1;
  require_head_dim(op.head_dim);
  require("k", k, q);
  require("v", v, q);
  require("cos", cos, {op.num_tokens, op.head_dim / 2});
  require("sin", sin, cos);
  bool valid = op.cu_seqlens[0] == 0 && op.cu_seqlens[op.num_segments] == op.num_tokens;
  for (std::int64_t i = 0; i < op.num_segments; ++i) valid = valid && op.cu_seqlens[i] <= op.cu_seqlens[i + 1];
  if (!valid)
    throw std::runtime_error("cu_seqlens does not grow from 0 to " + std::to_string(op.num_tokens) +
                             ", the number of tokens");
  op.out = context.output(0, q);
  segment_attention(op, level, context.parallel(), context.scratch());
}

namespace {

// A matrix of the graph's constants, in memory that is read faster than that of a mapped file.
struct Held {
  Held(const OrtKernelInfo* info, std::size_t input) : block(0) {
    const float* from = constant<float>(info, input, &shape);
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    block = Block(count * sizeof(float));
    std::copy(from, from + count, block.as<float>());
  }

  std::vector<std::int64_t> shape;
  Block block;
};

class LatentInjectionKernel : public Kernel {
 public:
  LatentInjectionKernel(const Level& level, const OrtKernelInfo* info)
      : level_(level), fc1_(info, 2), fc2_(info, 3), q_proj_(info, 4) {
    check(api->KernelInfoGetAttribute_int64(info, "num_heads", &num_heads_));
    check(api->KernelInfoGetAttribute_float(info, "eps", &eps_));
  }

  void run(OrtKernelContext* given) override {
    Context context(given);
    std::vector<std::int64_t> h, memory_k, shape;
    LatentInjection op{};
    op.h = context.input<float>(0, &h);
    op.memory_k = context.input<float>(5, &memory_k);
    if (h.size() != 3 || fc1_.shape.size() != 2 || memory_k.size() != 3 || memory_k[1] < 1)
      throw std::runtime_error("h is " + text(h) + ", fc1 is " + text(fc1_.shape) + " and memory_k is " +
                               text(memory_k) + ", expected [B, L, C], [I, C] and [B, T, C]");
    op.batch = h[0], op.num_latents = h[1], op.width = h[2], op.inner = fc1_.shape[0], op.num_steps = memory_k[1];
    op.num_heads = num_heads_, op.eps = eps_;
    if (num_heads_ < 1 || op.width % num_heads_ != 0)
      throw std::runtime_error(std::to_string(num_heads_) + " heads do not divide a width of " +
                               std::to_string(op.width));
    require("fc1", fc1_.shape, {op.inner, op.width});
    require("fc2", fc2_.shape, {op.width, op.inner});
    require("q_proj", q_proj_.shape, {op.width, op.width});
    require("memory_k", memory_k, {op.batch, op.num_steps, op.width});
    op.fc1 = fc1_.block.as<float>(), op.fc2 = fc2_.block.as<float>(), op.q_proj = q_proj_.block.as<float>();
    const auto read = [&](std::size_t index, const char* name, const std::vector<std::int64_t>& wanted) {
      const float* values = context.input<float>(index, &shape);
      require(name, shape, wanted);
      return values;
    };
    op.norm_in = read(1, "norm_in", {op.width});
    op.memory_v = read(6, "memory_v", memory_k);
    op.alpha = *read(7, "alpha", {});
    op.norm_out = read(8, "norm_out", {op.width});
    op.rho = *read(9, "rho", {});
    op.z = context.output(0, h);
    latent_injection(op, level_, context.parallel(), context.scratch());
  }

 private:
  const Level& level_;
  Held fc1_, fc2_, q_proj_;
  std::int64_t num_heads_ = 0;
  float eps_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> make_latent_injection(const Level& level, const OrtKernelInfo* info) {
  return std::make_unique<LatentInjectionKernel>(level, info);
}

}  // namespace vlrt
