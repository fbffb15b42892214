// The latent injection module on plain arrays. Formula: kernels/reference.py.
#pragma once

#include "attention.h"

namespace vlrt {

struct LatentInjection {
  std::int64_t batch, num_latents, width, inner, num_steps, num_heads;
  float eps;
  const float* h;         // [B, L, C]
  const float* norm_in;   // [C]
  const float* fc1;       // [I, C]
  const float* fc2;       // [C, I]
  const float* q_proj;    // [C, C]
  const float* memory_k;  // [B, T, C]
  const float* memory_v;  // [B, T, C]
  float alpha, rho;
  const float* norm_out;  // [C]
  float* z;               // [B, L, C]
};

void latent_injection(const LatentInjection& op, const Level& level, const Parallel& parallel, const Scratch& scratch);

}  // namespace vlrt
