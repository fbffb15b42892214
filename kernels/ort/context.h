// What an op may ask of ONNX Runtime while it runs, through the C API. Throws; library.cpp catches.
#pragma once

#include <onnxruntime_c_api.h>

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "memory.h"

namespace vlrt {

extern const OrtApi* api;  // set once, before any op is made

inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

inline std::string text(const std::vector<std::int64_t>& shape) {
  std::string words = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) words += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return words + "]";
}

inline void require(const char* name, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& wanted) {
  if (shape != wanted)
    throw std::runtime_error(std::string(name) + " is " + text(shape) + ", expected " + text(wanted));
}

// Returns the numbers of a tensor, and its shape where that is asked for.
template <typename T>
const T* read(const OrtValue* value, std::vector<std::int64_t>* shape) {
  if (shape != nullptr) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    std::size_t rank = 0;
    OrtStatus* status = api->GetDimensionsCount(info, &rank);
    shape->resize(status == nullptr ? rank : 0);
    if (status == nullptr) status = api->GetDimensions(info, shape->data(), rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
  }
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // 1.17 has no other way to read
  return static_cast<const T*>(data);
}

// A constant of a graph and its shape.
template <typename T>
const T* constant(const OrtKernelInfo* info, std::size_t input, std::vector<std::int64_t>* shape) {
  const OrtValue* value = nullptr;
  int is_constant = 0;
  check(api->KernelInfoGetConstantInput_tensor(info, input, &is_constant, &value));
  if (is_constant == 0) throw std::runtime_error("weights must be constants of the graph");
  return read<T>(value, shape);
}

// What an op may ask of the run that it is part of.
class Context {
 public:
  explicit Context(OrtKernelContext* context) : context_(context) {}
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  ~Context() {
    for (void* memory : scratch_) api->ReleaseStatus(api->AllocatorFree(allocator_, memory));
    if (allocator_ != nullptr) api->ReleaseAllocator(allocator_);
  }

  template <typename T>
  const T* input(std::size_t index, std::vector<std::int64_t>* shape = nullptr) const {
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context_, index, &value));
    return read<T>(value, shape);
  }

  float* output(std::size_t index, const std::vector<std::int64_t>& shape) const {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    prefer_huge_pages(data, count * sizeof(float));
    return static_cast<float*>(data);
  }

  // On ONNX Runtime's own threads, one call at a time: the work of two calls may differ by much. What a call throws is
  // thrown here, once the others are done: ONNX Runtime would end the process.
  Parallel parallel() const {
    return [this](std::size_t count, const std::function<void(std::size_t)>& body) {
      if (count == 0) return;
      if (count == 1) return body(0);
      struct Call {
        const std::function<void(std::size_t)>& body;
        std::mutex mutex;
        std::exception_ptr thrown;
      } call{body, {}, nullptr};
      auto run = [](void* data, std::size_t index) {
        Call& made = *static_cast<Call*>(data);
        try {
          made.body(index);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(made.mutex);
          made.thrown = std::current_exception();
        }
      };
      check(api->KernelContext_ParallelFor(context_, run, count, count, &call));
      if (call.thrown != nullptr) std::rethrow_exception(call.thrown);
    };
  }

  Scratch scratch() {
    return [this](std::size_t count) {
      if (allocator_ == nullptr) {
        OrtMemoryInfo* info = nullptr;
        check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info));
        OrtStatus* status = api->KernelContext_GetAllocator(context_, info, &allocator_);
        api->ReleaseMemoryInfo(info);
        check(status);
      }
      scratch_.push_back(nullptr);
      check(api->AllocatorAlloc(allocator_, count * sizeof(float), &scratch_.back()));
      prefer_huge_pages(scratch_.back(), count * sizeof(float));
      return static_cast<float*>(scratch_.back());
    };
  }

 private:
  OrtKernelContext* context_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> scratch_;
};

// One node of a session.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void run(OrtKernelContext* context) = 0;
};

// The ops: inputs are checked, then computed on.
void run_video_attention(const Level& level, OrtKernelContext* context);
void run_lane_attention(const Level& level, OrtKernelContext* context);
void run_segment_attention(const Level& level, OrtKernelContext* context);
std::unique_ptr<Kernel> make_latent_injection(const Level& level, const OrtKernelInfo* info);

}  // namespace vlrt
