// Bicubic, antialiased resampling of RGB pictures in fp32, rounded once, as torchvision does it with tensors of uint8.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tile.h"

namespace vlrt {
namespace {

// What each of `out` numbers is made of, of `in`: `count` of them from `first` on, of which the last may weigh nothing.
struct Taps {
  Taps(std::int64_t in, std::int64_t out) {
    const double scale = static_cast<double>(in) / static_cast<double>(out), wide = std::max(scale, 1.0);
    count = static_cast<int>(std::min<std::int64_t>(static_cast<std::int64_t>(std::ceil(4 * wide)) + 1, in));
    first.resize(static_cast<std::size_t>(out)), weights.resize(static_cast<std::size_t>(out * count));
    for (std::int64_t i = 0; i < out; ++i) {
      const double center = (static_cast<double>(i) + 0.5) * scale;
      const auto low = std::max<std::int64_t>(static_cast<std::int64_t>(center - 2 * wide + 0.5), 0);
      const auto high = std::min<std::int64_t>(static_cast<std::int64_t>(center + 2 * wide + 0.5), in);
      const std::int64_t start = std::min(low, in - count);  // all of them are there
      double sum = 0;
      for (std::int64_t j = low; j < high; ++j) sum += cubic((static_cast<double>(j) - center + 0.5) / wide);
      float* to = &weights[static_cast<std::size_t>(i * count)];
      for (std::int64_t j = low; j < high; ++j)
        to[j - start] = static_cast<float>(cubic((static_cast<double>(j) - center + 0.5) / wide) / sum);
      first[static_cast<std::size_t>(i)] = start;
    }
  }

  // Keys 1981, a = -0.5.
  static double cubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }

  int count;
  std::vector<std::int64_t> first;
  std::vector<float> weights;  // [out, count]
};

}  // namespace

// out [rows, columns, 3] = a picture [height, width, 3], whose rows are `stride` bytes apart.
void resample(const std::uint8_t* picture, std::int64_t height, std::int64_t width, std::int64_t stride,
              std::int64_t rows, std::int64_t columns, const Level& level, std::uint8_t* out) {
  const Taps down(height, rows), across(width, columns);
  std::vector<float> row(static_cast<std::size_t>(3 * width + 1));
  std::vector<const std::uint8_t*> sources(static_cast<std::size_t>(down.count));
  for (std::int64_t y = 0; y < rows; ++y, out += 3 * columns) {
    for (int k = 0; k < down.count; ++k)
      sources[static_cast<std::size_t>(k)] = picture + (down.first[static_cast<std::size_t>(y)] + k) * stride;
    level.blend(sources.data(), &down.weights[static_cast<std::size_t>(y * down.count)], down.count, 3 * width,
                row.data());
    level.gather(row.data(), across.first.data(), across.weights.data(), across.count, columns, out);
  }
}

}  // namespace vlrt

// For the runtime, which calls it without ONNX Runtime. Sides are positive. Returns 0; 1 where this processor does not
// have the level, 2 where memory runs out.
extern "C" __attribute__((visibility("default"))) int vlrt_resize(const char* level, const std::uint8_t* picture,
                                                                  std::int64_t height, std::int64_t width,
                                                                  std::int64_t stride, std::int64_t rows,
                                                                  std::int64_t columns, std::uint8_t* out) {
  const vlrt::Level* found = vlrt::find_level(level);
  if (found == nullptr) return 1;
  try {
    vlrt::resample(picture, height, width, stride, rows, columns, *found, out);
  } catch (...) {
    return 2;
  }
  return 0;
}
