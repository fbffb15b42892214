// libvlrt_ort: the attention ops of the domain `vlrt` as custom ops of ONNX Runtime's CPU provider, by its C API.
//
// ONNX Runtime finds `RegisterCustomOps`. The session config entry `vlrt.simd` picks a level: "auto", the default, is
// the best one that computes in fp32 throughout, "auto-bf16" may be one with products in bf16. No exception leaves this
// file; what is wrong with an input is said in an OrtStatus.

#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "context.h"

namespace vlrt {

const OrtApi* api = nullptr;

}  // namespace vlrt

namespace {

using vlrt::api;
using vlrt::check;

// The release that brought the last of what is called here (KernelContext_ParallelFor); newer runtimes keep serving it.
constexpr std::uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime are older than 1.17");

std::atomic<std::int64_t> num_kernels{0};

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
      ++num_kernels;
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
      : video_attention("VideoAttention", level, vlrt::run_video_attention, 7, 3),
        segment_attention("SegmentAttention", level, vlrt::run_segment_attention, 5, 1) {
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
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "libvlrt_ort needs ONNX Runtime 1.17 or newer");
  return guarded([&] {
    const std::string name = chosen_level(options);
    const vlrt::Level* level = vlrt::find_level(name.c_str());
    if (level == nullptr) throw std::runtime_error("vlrt.simd is '" + name + "', which this processor does not have");
    check(api->AddCustomOpDomain(options, domain_of(level)));
  });
}

// Returns the name of the level that is meant, such as by "auto"; null where this processor does not have it.
VLRT_EXPORT const char* vlrt_level(const char* level) {
  const vlrt::Level* found = vlrt::find_level(level);
  return found == nullptr ? nullptr : found->name;
}

// Returns how many kernels sessions have made so far: whether they take them, or the bodies of the functions.
VLRT_EXPORT std::int64_t vlrt_num_kernels() { return num_kernels; }

// out = 2^x at a level; returns 0, or 1 where this processor does not have it. For tests.
VLRT_EXPORT int vlrt_exp2(const char* level, const float* x, float* out, std::size_t count) {
  const vlrt::Level* found = vlrt::find_level(level);
  if (found == nullptr) return 1;
  found->exp2(x, out, count);
  return 0;
}
