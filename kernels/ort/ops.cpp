#include <algorithm>

#include "context.h"

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

}  // namespace vlrt
