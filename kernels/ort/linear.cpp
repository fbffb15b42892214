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

constexpr std::int64_t kFewestTasks = 16;  // that many rows are divided into, where columns allow

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

// Memory of the calling thread that grows and stays: a packed panel or sums, some hundred kilobytes.
std::int8_t* thread_buffer(int which, std::size_t bytes) {
  thread_local std::vector<std::int8_t> buffers[2];
  std::vector<std::int8_t>& buffer = buffers[which];
  if (buffer.size() < bytes + 64) buffer.resize(bytes + 64);
  return buffer.data() + (64 - reinterpret_cast<std::uintptr_t>(buffer.data()) % 64) % 64;
}

class Run {
 public:
  Run(const Linear& op, const LinearLevel& level, const Parallel& parallel, const Scratch& scratch)
      : op_(op), level_(level), parallel_(parallel) {
    const std::int64_t lines = round_up(op.k, 64) / 64;
    rows_.stride = 64 * (lines | 1);  // an odd number of cache lines: rows do not fall on the same sets
    const std::int64_t padded = round_up(op.m, kBlockRows);
    float* memory = scratch(static_cast<std::size_t>(padded * (rows_.stride / 4 + 2)));
    rows_.a = reinterpret_cast<std::int8_t*>(memory);
    rows_.scale = memory + padded * rows_.stride / 4;
    rows_.sum = reinterpret_cast<std::int32_t*>(rows_.scale + padded);
    std::fill(rows_.sum, rows_.sum + padded, 0);
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
      for (std::int64_t i = first; i < std::min(first + kTogether, op_.m); ++i)
        level_.quantise(op_.x + i * op_.k, op_.k, rows_.stride, rows_.a + i * rows_.stride, rows_.scale + i,
                        rows_.sum + i);
    });
  }

  // Columns of all parts one after the other are cut into tasks: of a gated pair, the same columns of both.
  void few() {
    struct Task {
      int part;
      std::int64_t col, cols;
    };
    std::vector<Task> tasks;
    for (int p = 0; p < (op_.gated ? 1 : op_.num_parts); ++p) {
      // Few and wide: the longer the pieces of a row, the faster memory is; four cores or fewer use all that it gives.
      const std::int64_t n = op_.parts[p].n, units = (n + kPanel - 1) / kPanel;
      const std::int64_t count = std::max<std::int64_t>(n / 2048, std::clamp<std::int64_t>(n / 192, 1, 4));
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t col = units * i / count * kPanel;
        tasks.push_back({p, col, std::min(units * (i + 1) / count * kPanel, n) - col});
      }
    }
    parallel_(tasks.size(), [&](std::size_t index) {
      const Task& task = tasks[index];
      const std::int64_t ld = round_up(task.cols, kPanel);
      auto* acc = reinterpret_cast<std::int32_t*>(thread_buffer(0, static_cast<std::size_t>(2 * op_.m * ld * 4)));
      Epilogue end = epilogue(task.part, 0, static_cast<int>(op_.m), task.col, static_cast<int>(task.cols));
      end.acc = acc, end.ld = ld;
      if (op_.gated) end.up_acc = acc + op_.m * ld;
      for (int p = 0; p < (op_.gated ? 2 : 1); ++p) {
        const LinearPart& part = op_.parts[task.part + p];
        level_.few(rows_.a, rows_.stride, rows_.sum, static_cast<int>(op_.m), op_.k, part.q + task.col, part.n,
                   static_cast<int>(task.cols), acc + p * op_.m * ld, ld);
      }
      level_.finish(end);
    });
  }

  // Tasks are panels of columns against as many rows as the second-level cache holds.
  void many() {
    constexpr std::int64_t kCacheBytes = 1 << 20;
    const std::int64_t chunk = std::max<std::int64_t>(kCacheBytes / rows_.stride / kBlockRows, 1) * kBlockRows;
    const std::int64_t chunks = (op_.m + chunk - 1) / chunk;
    // Neighbouring panels are packed together where there are many: memory is faster in longer pieces of a row.
    constexpr std::int64_t kPackedBytes = 1 << 19;
    const int num = op_.gated ? 1 : op_.num_parts;
    const std::int64_t size = round_up(op_.k, 64) * kPanel, most = kPackedBytes / size / (op_.gated ? 2 : 1);
    struct Group {
      int part;
      std::int64_t col, cols;
    };
    std::vector<Group> groups;
    for (int p = 0; p < num; ++p) {
      const std::int64_t n = op_.parts[p].n;
      const std::int64_t width = std::clamp<std::int64_t>(std::min(most, n / kPanel / kFewestTasks), 1, 4) * kPanel;
      for (std::int64_t col = 0; col < n; col += width) groups.push_back({p, col, std::min(width, n - col)});
    }
    parallel_(groups.size() * static_cast<std::size_t>(chunks), [&](std::size_t task) {
      const Group& group = groups[task % groups.size()];
      const std::int64_t first = static_cast<std::int64_t>(task / groups.size()) * chunk;
      by_panels(group.part, group.col, group.cols, size, first, std::min(first + chunk, op_.m));
    });
  }

  // Columns of one part, or of a gated pair, against the rows first .. last.
  void by_panels(int p, std::int64_t col, std::int64_t cols, std::int64_t size, std::int64_t first,
                 std::int64_t last) const {
    const int pair = op_.gated ? 2 : 1;
    const std::int64_t panels = (cols + kPanel - 1) / kPanel;
    std::int8_t* packed = thread_buffer(1, static_cast<std::size_t>(pair * panels * size));
    for (int i = 0; i < pair; ++i)
      level_.pack(op_.parts[p + i].q + col, op_.parts[p + i].n, op_.k, static_cast<int>(cols),
                  packed + i * panels * size, size);
    if (level_.begin != nullptr) level_.begin();
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t at = col + panel * kPanel;
      const int width = static_cast<int>(std::min<std::int64_t>(kPanel, col + cols - at));
      for (std::int64_t row = first; row < last; row += kBlockRows) {
        alignas(64) std::int32_t acc[2][kBlockRows * kPanel];
        const int count = static_cast<int>(std::min<std::int64_t>(kBlockRows, last - row));
        for (int i = 0; i < pair; ++i)
          level_.block(rows_.a + row * rows_.stride, rows_.stride, rows_.sum + row, count, op_.k,
                       packed + (i * panels + panel) * size, acc[i]);
        Epilogue end = epilogue(p, row, count, at, width);
        end.acc = acc[0], end.ld = kPanel;
        if (op_.gated) end.up_acc = acc[1];
        level_.finish(end);
      }
    }
    if (level_.end != nullptr) level_.end();
  }

  Epilogue epilogue(int p, std::int64_t row, int rows, std::int64_t col, int cols) const {
    const LinearPart& part = op_.parts[p];
    Epilogue end{};
    end.rows = rows, end.cols = cols, end.row_scale = rows_.scale + row;
    end.scale = part.scale + col, end.bias = part.bias == nullptr ? nullptr : part.bias + col;
    if (op_.gated) {
      const LinearPart& up = op_.parts[p + 1];
      end.up_scale = up.scale + col, end.up_bias = up.bias == nullptr ? nullptr : up.bias + col;
    }
    end.ldo = part.n, end.out = part.out + row * part.n + col;
    if (op_.residual != nullptr) end.residual = op_.residual + row * part.n + col;
    return end;
  }

  const Linear& op_;
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

void linear(const Linear& op, const LinearLevel& level, const Parallel& parallel, const Scratch& scratch) {
  if (op.m == 0) return;
  Run(op, level, parallel, scratch)();
}

}  // namespace vlrt
