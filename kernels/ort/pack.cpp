#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace vlrt {
namespace {

constexpr std::int64_t kColumns = 8 * kPanel;  // packed at once: pieces of a row that memory is read in

// Packs matrices: `pack(matrix, first column, columns, to, weight)` does so for some columns of one.
template <typename M, typename Pack>
std::vector<PackedWeight> packed_by(const std::vector<M>& matrices, bool gated, int bits, const Pack& pack) {
  std::vector<PackedWeight> packed;
  for (const M& matrix : matrices) {
    const std::int64_t panels = divide_up(matrix.n, kPanel);
    PackedWeight weight{matrix.k, matrix.n, bits, 0, Block(0), {}};
    const std::int64_t bytes = weight.bytes(kPanel);
    weight.apart = gated ? 2 * bytes : bytes;
    weight.panels = gated && !packed.empty() ? packed[0].panels.behind(static_cast<std::size_t>(bytes))
                                             : Block(static_cast<std::size_t>(weight.apart * panels));
    weight.sum.resize(static_cast<std::size_t>(panels * kPanel));
    on_all_cores(static_cast<std::size_t>(divide_up(matrix.n, kColumns)), [&](std::size_t index) {
      const std::int64_t col = static_cast<std::int64_t>(index) * kColumns;
      pack(matrix, col, std::min(kColumns, matrix.n - col),
           weight.panels.template as<std::int8_t>() + col / kPanel * weight.apart, weight);
    });
    packed.push_back(std::move(weight));
  }
  return packed;
}

// Scales [n, groups] as multiples of their column's.
std::vector<std::uint8_t> factors_of(const FourBitMatrix& matrix) {
  const std::int64_t groups = divide_up(matrix.k, kGroup);
  std::vector<std::uint8_t> factors(static_cast<std::size_t>(matrix.n * groups));
  for (std::int64_t i = 0; i < matrix.n * groups; ++i) {
    const int zero = matrix.zeros[i / groups * divide_up(groups, 2) + i % groups / 2] >> i % groups % 2 * 4 & 15;
    const float factor = std::rint(matrix.scales[i] / matrix.scale[i / groups]);
    const bool whole = std::fabs(matrix.scales[i] - factor * matrix.scale[i / groups]) <= 1e-5f * matrix.scales[i];
    if (!whole || factor < 0 || factor * static_cast<float>(std::max(zero, 15 - zero)) > 127)
      throw std::runtime_error("4-bit scales are no multiples of their column's that int8 holds");
    factors[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(factor);
  }
  return factors;
}

}  // namespace

std::vector<PackedWeight> pack_weights(const std::vector<Matrix>& matrices, bool gated, const LinearLevel& level) {
  return packed_by(matrices, gated, 8,
                   [&](const Matrix& from, std::int64_t col, std::int64_t cols, std::int8_t* to, PackedWeight& weight) {
                     level.pack(from.q + col, from.n, from.k, cols, to, weight.apart,
                                &weight.sum[static_cast<std::size_t>(col)]);
                   });
}

std::vector<PackedWeight> pack_weights(const std::vector<FourBitMatrix>& matrices, bool gated,
                                       const LinearLevel& level) {
  std::vector<std::vector<std::uint8_t>> factors;
  for (const FourBitMatrix& matrix : matrices) factors.push_back(factors_of(matrix));
  return packed_by(matrices, gated, 4,
                   [&](const FourBitMatrix& from, std::int64_t col, std::int64_t cols, std::int8_t* to,
                       PackedWeight& weight) {
                     level.pack_4bit(from, factors[static_cast<std::size_t>(&from - matrices.data())].data(), col, cols,
                                     to, weight.apart, &weight.sum[static_cast<std::size_t>(col)]);
                   });
}

}  // namespace vlrt
