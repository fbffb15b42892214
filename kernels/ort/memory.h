// Memory in huge pages, where the system has them: small ones that lie apart are read at half the speed.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace vlrt {

// Memory that is zero at first, aligned to a cache line. Blocks share slabs of huge pages; one is freed with its last.
class Block {
 public:
  explicit Block(std::size_t bytes);

  // Memory that shares its slab with none.
  static Block alone(std::size_t bytes);

  // The same memory, from so many bytes on.
  Block behind(std::size_t bytes) const { return Block({start_, start_.get() + bytes}); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(static_cast<void*>(start_.get()));
  }

 private:
  explicit Block(std::shared_ptr<char> start) : start_(std::move(start)) {}

  std::shared_ptr<char> start_;
};

// Memory of the calling thread, valid until it asks for more; what is in it is not defined.
void* memory_of_thread(std::size_t bytes);

// Asks for huge pages where memory of so many bytes lies, before anyone has written there; what is small is left alone,
// and a system that has none goes on without.
void prefer_huge_pages(const void* start, std::size_t bytes);

}  // namespace vlrt
