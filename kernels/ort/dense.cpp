#include "dense.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"
#include "tile.h"

namespace vlrt {
namespace {

constexpr std::int64_t kRowsTogether = 32, kChunkRows = 768;
constexpr std::int64_t kSlice = 1024;         // of k, that a group of split panels has in the second-level cache
constexpr std::int64_t kGroupPanels = 4;      // likewise
constexpr std::int64_t kTaskBytes = 1 << 18;  // of weights, that are worth a task where rows are few

class Run {
 public:
  Run(const Linear& op, const std::vector<DenseWeight>& weights, const DenseLevel& level, const Parallel& parallel,
      const Scratch& scratch)
      : op_(op), weights_(weights), level_(level), parallel_(parallel), scratch_(scratch) {}

  void operator()() {
    if (op_.m <= level_.few_rows) {
      few();
      return;
    }
    row_planes_ = padded() / 32 * kRowsTogether * split_size();
    const std::int64_t chunk = std::min(kChunkRows, round_up(op_.m, kRowsTogether));
    planes_ = reinterpret_cast<std::uint16_t*>(
        scratch_(static_cast<std::size_t>(chunk / kRowsTogether * row_planes_ / 2)));
    for (std::int64_t first = 0; first < op_.m; first += chunk) many(first, std::min(first + chunk, op_.m));
  }

 private:
  // Some panels of one part, or of a gated pair the same ones of both.
  struct Group {
    int part;
    std::int64_t first, last;
  };

  std::int64_t split_size() const { return 32 * level_.planes; }  // elements that 32 floats become
  std::int64_t padded() const { return round_up(op_.k, 32); }
  int pair() const { return op_.gated ? 2 : 1; }
  const DenseWeight& weight(int part) const { return weights_[static_cast<std::size_t>(part)]; }

  // Panels of all parts by so many. The last ones are halved where that leaves as much for a second thread.
  std::vector<Group> groups(std::int64_t size) const {
    std::vector<Group> found;
    for (int p = 0; p < (op_.gated ? 1 : op_.num_parts); ++p) {
      const std::int64_t panels = divide_up(weight(p).n, kDensePanel);
      for (std::int64_t i = 0; i < panels; i += size) found.push_back({p, i, std::min(i + size, panels)});
    }
    Group& end = found.back();
    if (found.size() % 2 == 1 && end.last - end.first > 1) {
      const std::int64_t middle = (end.first + end.last) / 2;
      const Group half = {end.part, middle, end.last};
      end.last = middle;
      found.push_back(half);
    }
    return found;
  }

  void few() {
    const std::vector<Group> tasks =
        groups(std::max<std::int64_t>(kTaskBytes / (padded() * kDensePanel * 4 * pair()), 1));
    parallel_(tasks.size(), [&](std::size_t index) {
      const Group& task = tasks[index];
      alignas(64) float acc[2][kRowsTogether * kDensePanel];
      for (std::int64_t i = task.first; i < task.last; ++i) {
        for (int p = 0; p < pair(); ++p)
          level_.few(op_.x, op_.k, static_cast<int>(op_.m), op_.k, weight(task.part + p).panel(i), acc[p]);
        finish(task.part, i, 0, op_.m, acc[0], acc[1]);
      }
    });
  }

  // Rows first .. last, of a chunk.
  void many(std::int64_t first, std::int64_t last) {
    const std::int64_t blocks = divide_up(last - first, kRowsTogether);
    parallel_(static_cast<std::size_t>(blocks), [&](std::size_t index) {
      const std::int64_t row = first + static_cast<std::int64_t>(index) * kRowsTogether;
      level_.split_rows(op_.x + row * op_.k, op_.k, static_cast<int>(std::min(kRowsTogether, last - row)), op_.k,
                        planes_ + static_cast<std::int64_t>(index) * row_planes_);
    });
    const std::vector<Group> tasks = groups(kGroupPanels / pair());
    parallel_(tasks.size(), [&](std::size_t index) { multiply(tasks[index], first, last); });
  }

  // Panels are split once and stay in the cache, rows come by; sums of slices of k add up in memory of the thread.
  void multiply(const Group& group, std::int64_t first, std::int64_t last) const {
    const std::int64_t panels = (group.last - group.first) * pair(), slice = std::min(kSlice, padded());
    const std::int64_t panel_planes = slice / 32 * kDensePanel * split_size();
    constexpr std::int64_t kSums = kRowsTogether * kDensePanel;
    const std::int64_t blocks = divide_up(last - first, kRowsTogether);
    auto* sums = static_cast<float*>(
        memory_of_thread(static_cast<std::size_t>(blocks * panels * kSums * 4 + panels * panel_planes * 2)));
    auto* split = reinterpret_cast<std::uint16_t*>(sums + blocks * panels * kSums);
    level_.begin();
    for (std::int64_t k = 0; k < padded(); k += slice) {
      const std::int64_t depth = std::min(slice, padded() - k);
      for (std::int64_t i = 0; i < panels; ++i)
        level_.split_panel(weight(group.part + static_cast<int>(i % pair())).panel(group.first + i / pair()) +
                               k * kDensePanel,
                           depth, split + i * panel_planes);
      for (std::int64_t b = 0; b < blocks; ++b) {
        float* acc = sums + b * panels * kSums;
        for (std::int64_t i = 0; i < panels; ++i)
          level_.block(planes_ + b * row_planes_ + k / 32 * kRowsTogether * split_size(), split + i * panel_planes,
                       depth, acc + i * kSums, k == 0);
        if (k + depth < padded()) continue;
        const std::int64_t row = first + b * kRowsTogether;
        for (std::int64_t i = 0; i < panels; i += pair())
          finish(group.part, group.first + i / pair(), row, std::min(row + kRowsTogether, last), acc + i * kSums,
                 acc + (i + 1) * kSums);
      }
    }
    level_.end();
  }

  // `up` counts for gated pairs alone.
  void finish(int p, std::int64_t panel, std::int64_t row, std::int64_t last, const float* acc, const float* up) const {
    const LinearPart& part = op_.parts[p];
    const std::int64_t col = panel * kDensePanel;
    DenseEpilogue end{};
    end.acc = acc, end.rows = static_cast<int>(last - row);
    end.cols = static_cast<int>(std::min<std::int64_t>(part.n - col, kDensePanel));
    end.bias = part.bias == nullptr ? nullptr : part.bias + col;
    if (op_.gated) {
      const float* up_bias = op_.parts[p + 1].bias;
      end.up_acc = up, end.up_bias = up_bias == nullptr ? nullptr : up_bias + col;
    }
    end.ldo = part.n, end.out = part.out + row * end.ldo + col;
    if (op_.residual != nullptr) end.residual = op_.residual + row * end.ldo + col;
    level_.finish(end);
  }

  const Linear& op_;
  const std::vector<DenseWeight>& weights_;
  const DenseLevel& level_;
  const Parallel& parallel_;
  const Scratch& scratch_;
  std::uint16_t* planes_ = nullptr;  // of the rows of a chunk, split
  std::int64_t row_planes_ = 0;      // elements of kRowsTogether split rows
};

}  // namespace

std::vector<DenseWeight> pack_weights(const std::vector<FloatMatrix>& matrices, bool gated) {
  std::vector<DenseWeight> packed;
  for (const FloatMatrix& matrix : matrices) {
    const std::int64_t panels = divide_up(matrix.n, kDensePanel), size = round_up(matrix.k, 32) * kDensePanel;
    const std::int64_t apart = gated ? 2 * size : size;
    const Block block = gated && !packed.empty() ? packed[0].panels.behind(static_cast<std::size_t>(size) * 4)
                                                 : Block(static_cast<std::size_t>(apart * panels) * 4);
    constexpr std::int64_t kTogether = 16;  // panels: pieces of a row that memory is read in
    on_all_cores(static_cast<std::size_t>(divide_up(panels, kTogether)), [&](std::size_t index) {
      const std::int64_t first = static_cast<std::int64_t>(index) * kTogether;
      for (std::int64_t k = 0; k < matrix.k; ++k)
        for (std::int64_t i = first; i < std::min(first + kTogether, panels); ++i) {
          const std::int64_t col = i * kDensePanel, cols = std::min<std::int64_t>(kDensePanel, matrix.n - col);
          std::memcpy(block.as<float>() + i * apart + k * kDensePanel, matrix.w + k * matrix.n + col,
                      static_cast<std::size_t>(cols) * 4);
        }
    });
    packed.push_back({matrix.k, matrix.n, apart, block});
  }
  return packed;
}

const DenseLevel* find_dense_level(const char* name) {
#if defined(VLRT_AMX)
  const auto is = [name](const char* wanted) { return std::strcmp(name, wanted) == 0; };
  if ((is("auto") || is(kAmxDense.name)) && has_amx_bf16()) return &kAmxDense;
  if ((is("auto-bf16") || is(kAmxCoarse.name)) && has_amx_bf16()) return &kAmxCoarse;
#else
  (void)name;
#endif
  return nullptr;
}

void dense(const Linear& op, const std::vector<DenseWeight>& weights, const DenseLevel& level,
           const Parallel& parallel, const Scratch& scratch) {
  if (op.m == 0) return;
  Run(op, weights, level, parallel, scratch)();
}

}  // namespace vlrt
