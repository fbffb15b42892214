#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlrt {
namespace {

#if defined(__x86_64__)
struct Features {
  bool avx_vnni = false, avx512_vnni = false, amx_int8 = false;
};

// The compiler's own table does not know all of these everywhere.
Features look() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  found.avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx_vnni = avx2 && (a >> 4 & 1);
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: the kernel lends tiles to those who ask
  if (found.avx512_vnni && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1))
    found.amx_int8 = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
  return found;
}
#endif

constexpr std::int64_t kTaskBytes = 1 << 17;   // of weights, that are worth a task where rows are few
constexpr std::int64_t kCacheBytes = 1 << 20;  // of rows, that the second-level cache holds beside a panel
constexpr std::int64_t kGroupBytes = 1 << 19;  // of panels, for a task where rows are many
constexpr std::int64_t kManyTasks = 16;        // that many rows are divided into, where columns allow

class Run {
 public:
  Run(const Linear& op, const PackedWeight* weights, const LinearLevel& level, const Parallel& parallel,
      const Scratch& scratch)
      : op_(op), weights_(weights), level_(level), parallel_(parallel) {
    const std::int64_t lines = round_up(op.k, 64) / 64;
    rows_.stride = 64 * (lines | 1);  // an odd number of cache lines: rows do not fall on the same sets
    const std::int64_t padded = round_up(op.m, kBlockRows);
    float* memory = scratch(static_cast<std::size_t>(padded * (rows_.stride / 4 + 1)));
    rows_.a = reinterpret_cast<std::int8_t*>(memory);
    rows_.scale = memory + padded * rows_.stride / 4;
  }

  void operator()() {
    quantise();
    if (op_.m <= kFewRows) {
      few();
    } else {
      many();
    }
  }

 private:
  void quantise() {
    constexpr std::int64_t kTogether = 16;
    parallel_((op_.m + kTogether - 1) / kTogether, [&](std::size_t task) {
      const std::int64_t first = static_cast<std::int64_t>(task) * kTogether;
      for (std::int64_t i = first; i < std::min(first + kTogether, op_.m); ++i) {
        Row from{nullptr, nullptr, op_.norm, op_.eps};
        if (op_.coarse_x == nullptr) {
          from.x = op_.x + i * op_.k;
        } else {
          from.coarse = op_.coarse_x + i * round_up(op_.k, kPanel);
        }
        level_.quantise(from, op_.k, row(i), level_.tiled ? kBlockRows * 64 : 64, rows_.scale + i);
      }
    });
  }

  // Some panels of one part, or of a gated pair the same ones of both.
  struct Group {
    int part;
    std::int64_t first, last;
  };

  std::int8_t* row(std::int64_t index) const {
    const std::int64_t in_block = index % kBlockRows;
    return rows_.a + (index - in_block) * rows_.stride + in_block * (level_.tiled ? 64 : rows_.stride);
  }

  int pair() const { return op_.gated ? 2 : 1; }

  // Panels of all parts, in groups of at most so many bytes and about so many tasks.
  std::vector<Group> groups(std::int64_t bytes, std::int64_t tasks) const {
    std::vector<Group> found;
    for (int p = 0; p < (op_.gated ? 1 : op_.num_parts); ++p) {
      const PackedWeight& weight = weights_[p];
      const std::int64_t panels = divide_up(weight.n, kPanel);
      const std::int64_t size =
          std::max<std::int64_t>(std::min(bytes / (weight.bytes(kPanel) * pair()), panels / tasks), 1);
      for (std::int64_t i = 0; i < panels; i += size) found.push_back({p, i, std::min(i + size, panels)});
    }
    return found;
  }

  void few() {
    const std::vector<Group> tasks = groups(kTaskBytes, 1);
    parallel_(tasks.size(), [&](std::size_t index) {
      const Group& task = tasks[index];
      alignas(64) std::int32_t acc[2][kFewRows * kPanel];
      if (level_.begin != nullptr) level_.begin();
      for (std::int64_t i = task.first; i < task.last; ++i) {
        for (int p = 0; p < pair(); ++p) {
          const PackedWeight& weight = weights_[task.part + p];
          if (weight.bits == 4 && level_.few_4bit != nullptr) {
            level_.few_4bit(rows_.a, op_.k, weight.panel(i), acc[p]);
            continue;
          }
          level_.few(rows_.a, rows_.stride, static_cast<int>(op_.m), op_.k, int8(weight, i * kPanel, kPanel, 0),
                     &weight.sum[static_cast<std::size_t>(i * kPanel)], acc[p]);
        }
        level_.finish(epilogue(task.part, i * kPanel, kPanel, 0, static_cast<int>(op_.m), acc));
      }
      if (level_.end != nullptr) level_.end();
    });
  }

  // Tasks are panels against as many rows as the second-level cache holds.
  void many() {
    const std::int64_t chunk = std::max<std::int64_t>(kCacheBytes / rows_.stride / kBlockRows, 1) * kBlockRows;
    const std::int64_t chunks = divide_up(op_.m, chunk);
    const std::vector<Group> panels = groups(kGroupBytes, kManyTasks);
    parallel_(panels.size() * static_cast<std::size_t>(chunks), [&](std::size_t task) {
      const Group& group = panels[task % panels.size()];
      const std::int64_t first = static_cast<std::int64_t>(task / panels.size()) * chunk;
      multiply(group, first, std::min(first + chunk, op_.m));
    });
  }

  // Panels of one part, or of a gated pair, against the rows first .. last.
  void multiply(const Group& group, std::int64_t first, std::int64_t last) const {
    alignas(64) std::int32_t acc[2][2][kBlockRows * kPanel];  // one is written while the other one is finished
    Epilogue pending[2];
    const Epilogue* before = nullptr;
    int turn = 0;
    const std::int64_t blocks = divide_up(last - first, kBlockRows);
    const int width = level_.width;
    if (level_.begin != nullptr) level_.begin();
    for (std::int64_t col = group.first * kPanel; col < group.last * kPanel; col += width) {
      const std::int8_t* packed[2] = {};
      for (int p = 0; p < pair(); ++p)
        packed[p] = int8(weights_[group.part + p], col, width, p);
      for (std::int64_t b = 0; b < blocks; ++b, turn ^= 1) {
        const std::int64_t at = first + b * kBlockRows;
        const int count = static_cast<int>(std::min<std::int64_t>(kBlockRows, last - at));
        pending[turn] = epilogue(group.part, col, width, at, count, acc[turn]);
        for (int p = 0; p < pair(); ++p) {
          const PackedWeight& weight = weights_[group.part + p];
          const std::int64_t next = col + width, steps = weight.padded() / 64;
          const std::int64_t each = divide_up(divide_up(weight.bytes(width), 64 * steps), blocks);
          const Epilogue& end = pending[turn];
          const int size = end.coarse_out == nullptr ? 4 : 2;
          const void* out = end.coarse_out == nullptr ? static_cast<const void*>(end.out) : end.coarse_out;
          Ahead ahead{at_column(weight, next) + b * each * steps * 64, 0, static_cast<const char*>(out),
                      end.ldo * size, p == 0 ? count : 0, width * size};
          // The next columns are fetched by and by: as many lines in a step as it reads, divided by blocks.
          if (next < group.last * kPanel && b * each * steps * 64 < weight.bytes(width))
            ahead.lines = static_cast<int>(each);
          level_.block(row(at), rows_.stride, count, op_.k, packed[p], &weight.sum[static_cast<std::size_t>(col)],
                       acc[turn][p], p == 0 ? before : nullptr, ahead);
        }
        before = &pending[turn];
      }
    }
    if (level_.end != nullptr) level_.end();
    if (before != nullptr) level_.finish(*before);
  }

  const std::int8_t* at_column(const PackedWeight& weight, std::int64_t col) const {
    return weight.panel(col / kPanel) + col % kPanel / level_.width * weight.bytes(level_.width);
  }

  // Columns of a panel in int8: where they are, or, of 4 bits, made in memory of this thread, which has two places.
  const std::int8_t* int8(const PackedWeight& weight, std::int64_t col, int columns, int place) const {
    if (weight.bits == 8) return at_column(weight, col);
    const std::int64_t bytes = weight.padded() * columns, each = weight.padded() * level_.width;
    auto* to = static_cast<std::int8_t*>(memory_of_thread(static_cast<std::size_t>(2 * bytes))) + place * bytes;
    for (int i = 0; i < columns / level_.width; ++i)
      level_.unpack(at_column(weight, col + i * level_.width), op_.k, to + i * each);
    return to;
  }

  template <int N>
  Epilogue epilogue(int p, std::int64_t col, int cols, std::int64_t row, int rows, const std::int32_t (*acc)[N]) const {
    const LinearPart& part = op_.parts[p];
    Epilogue end{};
    end.acc = acc[0];
    end.ld = cols, end.rows = rows;
    end.cols = static_cast<int>(std::clamp<std::int64_t>(part.n - col, 0, cols));
    end.row_scale = rows_.scale + row;
    end.scale = part.scale + col, end.bias = part.bias == nullptr ? nullptr : part.bias + col;
    if (op_.gated) {
      const LinearPart& up = op_.parts[p + 1];
      end.up_acc = acc[1];
      end.up_scale = up.scale + col, end.up_bias = up.bias == nullptr ? nullptr : up.bias + col;
    }
    end.ldo = part.coarse_out == nullptr ? part.n : round_up(part.n, kPanel);
    if (part.coarse_out == nullptr) {
      end.out = part.out + row * end.ldo + col;
    } else {
      end.coarse_out = part.coarse_out + row * end.ldo + col;
    }
    if (op_.residual != nullptr) end.residual = op_.residual + row * end.ldo + col;
    return end;
  }

  const Linear& op_;
  const PackedWeight* weights_;  // of the parts
  const LinearLevel& level_;
  const Parallel& parallel_;
  Rows rows_{};
};

}  // namespace

const LinearLevel* find_linear_level(const char* name) {
#if defined(__x86_64__)
  static const Features has = look();
  const bool best = name == nullptr || std::strcmp(name, "auto") == 0;
  if ((best || std::strcmp(name, kAmxInt8.name) == 0) && has.amx_int8) return &kAmxInt8;
  if ((best || std::strcmp(name, kAvx512Vnni.name) == 0) && has.avx512_vnni) return &kAvx512Vnni;
  if ((best || std::strcmp(name, kAvxVnni.name) == 0) && has.avx_vnni) return &kAvxVnni;
#else
  (void)name;
#endif
  return nullptr;
}

void linear(const Linear& op, const std::vector<PackedWeight>& weights, const LinearLevel& level,
            const Parallel& parallel, const Scratch& scratch) {
  if (op.m == 0) return;
  if (!op.down) {
    Run(op, weights.data(), level, parallel, scratch)();
    return;
  }
  Linear gated = op, down{};
  const std::int64_t inner = op.parts[0].n;
  gated.down = false, gated.num_parts = 2;
  down.m = op.m, down.k = inner, down.num_parts = 1, down.parts[0] = op.parts[2], down.residual = op.x;
  auto* between = reinterpret_cast<std::uint16_t*>(
      scratch(static_cast<std::size_t>(op.m * round_up(inner, kPanel) / 2)));
  gated.parts[0].coarse_out = between, down.coarse_x = between;
  Run(gated, weights.data(), level, parallel, scratch)();
  Run(down, weights.data() + 2, level, parallel, scratch)();
}

}  // namespace vlrt
