// libvlrt_ort: the attention ops of the domain `vlrt` as custom ops of ONNX Runtime's CPU provider, by its C API.
//
// ONNX Runtime finds `RegisterCustomOps`. The session config entry `vlrt.simd` picks a level ("auto", the default, is
// the best one). No exception leaves this file; what is wrong with an input is said in an OrtStatus.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace {

// The release that brought the last of what is called here (KernelContext_ParallelFor); newer runtimes keep serving it.
constexpr std::uint32_t kApiVersion = 18;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime are older than 1.18");

const OrtApi* api = nullptr;  // set once, before any op is made

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

template <typename Body>
OrtStatus* guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, "unknown error in libvlrt_ort");
  }
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
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // 1.18 has no other way to read
    return static_cast<const T*>(data);
  }

  float* output(std::size_t index, const std::vector<std::int64_t>& shape) const {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return static_cast<float*>(data);
  }

  // On ONNX Runtime's own threads, one call at a time: the work of two calls may differ by much.
  vlrt::Parallel parallel() const {
    return [this](std::size_t count, const std::function<void(std::size_t)>& body) {
      if (count == 1) return body(0);
      auto call = [](void* data, std::size_t index) {
        (*static_cast<const std::function<void(std::size_t)>*>(data))(index);
      };
      check(api->KernelContext_ParallelFor(context_, call, count, count,
                                           const_cast<void*>(static_cast<const void*>(&body))));
    };
  }

  vlrt::Scratch scratch() {
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
      return static_cast<float*>(scratch_.back());
    };
  }

 private:
  OrtKernelContext* context_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> scratch_;
};

std::string text(const std::vector<std::int64_t>& shape) {
  std::string words = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) words += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return words + "]";
}

void require(const char* name, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& wanted) {
  if (shape != wanted)
    throw std::runtime_error(std::string(name) + " is " + text(shape) + ", expected " + text(wanted));
}

void require_head_dim(std::int64_t dim) {
  if (dim % 2 != 0 || dim < 2 || dim > vlrt::kMaxHeadDim)
    throw std::runtime_error("head dim is " + std::to_string(dim) + "; accepted: even, 2 to " +
                             std::to_string(vlrt::kMaxHeadDim));
}

void run_video_attention(const vlrt::Level& level, OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> q, k, v, cos, sin, k_cache, v_cache;
  vlrt::VideoAttention op{};
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
  op.out = context.output(0, q);
  op.k_cache = context.output(1, k_cache);
  op.v_cache = context.output(2, v_cache);
  const std::int64_t count = op.batch * op.num_kv_heads * op.num_slots * op.head_dim;
  if (op.k_cache != past_k) std::copy(past_k, past_k + count, op.k_cache);  // else the caller bound both to one buffer
  if (op.v_cache != past_v) std::copy(past_v, past_v + count, op.v_cache);
  vlrt::video_attention(op, level, context.parallel(), context.scratch());
}

void run_segment_attention(const vlrt::Level& level, OrtKernelContext* given) {
  Context context(given);
  std::vector<std::int64_t> q, k, v, cos, sin, bounds;
  vlrt::SegmentAttention op{};
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
  vlrt::segment_attention(op, level, context.parallel(), context.scratch());
}

// An op at one level. ONNX Runtime keeps the pointer and calls through the fields of the base.
struct Op : OrtCustomOp {
  using Run = void (*)(const vlrt::Level&, OrtKernelContext*);

  const char* name;
  const vlrt::Level* level;
  Run run;
  std::vector<ONNXTensorElementDataType> inputs;
  std::size_t num_outputs;

  Op(const char* op_name, const vlrt::Level* op_level, Run op_run, std::size_t num_floats, std::size_t op_num_outputs)
      : OrtCustomOp{}, name(op_name), level(op_level), run(op_run), num_outputs(op_num_outputs) {
    inputs.assign(num_floats, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    inputs.push_back(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, std::size_t i) { return self(op).inputs[i]; };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).num_outputs; };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo*, void** kernel) -> OrtStatus* {
      *kernel = const_cast<OrtCustomOp*>(op);  // a kernel has no state of its own
      return nullptr;
    };
    KernelDestroy = [](void*) {};
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      const Op& op = self(static_cast<const OrtCustomOp*>(kernel));
      return guarded([&] { op.run(*op.level, context); });
    };
  }

  static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
};

// The ops of one level.
struct Domain {
  explicit Domain(const vlrt::Level* level)
      : video_attention("VideoAttention", level, run_video_attention, 7, 3),
        segment_attention("SegmentAttention", level, run_segment_attention, 5, 1) {
    check(api->CreateCustomOpDomain("vlrt", &domain));
    check(api->CustomOpDomain_Add(domain, &video_attention));
    check(api->CustomOpDomain_Add(domain, &segment_attention));
  }

  Op video_attention, segment_attention;
  OrtCustomOpDomain* domain = nullptr;
};

// Sessions refer to a domain for as long as they live, so there is one per level, and it is never freed.
OrtCustomOpDomain* domain_of(const vlrt::Level* level) {
  static std::mutex mutex;
  static std::map<const vlrt::Level*, Domain*> made;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& found = made[level];
  if (found == nullptr) found = new Domain(level);
  return found->domain;
}

std::string chosen_level(const OrtSessionOptions* options) {
  int given = 0;
  check(api->HasSessionConfigEntry(options, "vlrt.simd", &given));
  if (given == 0) return "auto";
  std::size_t size = 0;
  check(api->GetSessionConfigEntry(options, "vlrt.simd", nullptr, &size));
  std::string name(size, '\0');
  check(api->GetSessionConfigEntry(options, "vlrt.simd", name.data(), &size));
  return name.c_str();  // without the terminating zero
}

}  // namespace

#define VLRT_EXPORT extern "C" __attribute__((visibility("default")))

VLRT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  api = base->GetApi(kApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "libvlrt_ort needs ONNX Runtime 1.18 or newer");
  return guarded([&] {
    const std::string name = chosen_level(options);
    const vlrt::Level* level = vlrt::find_level(name.c_str());
    if (level == nullptr) throw std::runtime_error("vlrt.simd is '" + name + "', which this processor does not have");
    check(api->AddCustomOpDomain(options, domain_of(level)));
  });
}

// Returns the level that "auto" means on this processor.
VLRT_EXPORT const char* vlrt_simd() { return vlrt::find_level(nullptr)->name; }

// out = 2^x at a level; returns 0, or 1 where this processor does not have it. For tests.
VLRT_EXPORT int vlrt_exp2(const char* level, const float* x, float* out, std::size_t count) {
  const vlrt::Level* found = vlrt::find_level(level);
  if (found == nullptr) return 1;
  found->exp2(x, out, count);
  return 0;
}
