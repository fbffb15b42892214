#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlrt {
namespace {

constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
constexpr std::size_t kSlab = std::size_t{1} << 25, kLine = 64;

// Memory of the system that is handed out from its start to its end.
class Slab {
 public:
  explicit Slab(std::size_t bytes) : bytes_((bytes + kHuge - 1) / kHuge * kHuge) {
#if defined(__linux__)
    // A piece that begins with a huge page; what is never written to takes no memory.
    mapped_ = mmap(nullptr, bytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    next_ = static_cast<char*>(mapped_) + (kHuge - reinterpret_cast<std::uintptr_t>(mapped_) % kHuge) % kHuge;
    madvise(next_, bytes_, MADV_HUGEPAGE);  // a wish: without it everything works
#else
    mapped_ = std::calloc(bytes_ + kLine, 1);
    if (mapped_ == nullptr) throw std::bad_alloc();
    next_ = static_cast<char*>(mapped_) + (kLine - reinterpret_cast<std::uintptr_t>(mapped_) % kLine) % kLine;
#endif
    end_ = next_ + bytes_;
  }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() {
#if defined(__linux__)
    munmap(mapped_, bytes_ + kHuge);
#else
    std::free(mapped_);
#endif
  }

  std::size_t left() const { return static_cast<std::size_t>(end_ - next_); }
  char* take(std::size_t bytes) {
    next_ += bytes;
    return next_ - bytes;
  }

 private:
  std::size_t bytes_;
  void* mapped_;
  char *next_, *end_;
};

}  // namespace

Block::Block(std::size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Slab> last;  // with room left, perhaps
  const std::lock_guard<std::mutex> lock(mutex);
  const std::size_t size = (bytes + kLine - 1) / kLine * kLine;
  std::shared_ptr<Slab> slab = last.lock();
  if (slab == nullptr || slab->left() < size) last = slab = std::make_shared<Slab>(std::max(size, kSlab));
  start_ = {slab, slab->take(size)};
}

Block Block::alone(std::size_t bytes) {
  const auto slab = std::make_shared<Slab>(bytes);
  return Block({slab, slab->take(bytes)});
}

void* memory_of_thread(std::size_t bytes) {
  static thread_local Block block = Block::alone(0);  // threads outlive sessions, whose weights lie in shared slabs
  static thread_local std::size_t size = 0;
  if (size < bytes) block = Block::alone(bytes), size = bytes;
  return block.as<void>();
}

void prefer_huge_pages(const void* start, std::size_t bytes) {
#if defined(__linux__)
  if (bytes < kHuge / 2) return;
  // With what lies around it, of the same arena: tensors are neither as large as a huge page nor aligned to it.
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(start) / kHuge * kHuge;
  const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(start) + bytes + kHuge - 1;
  madvise(reinterpret_cast<void*>(first), (last - first) / kHuge * kHuge, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace vlrt
