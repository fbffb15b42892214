// libvlrt_ort: attention, the latent injection and linear layers of the domain `vlrt` as custom ops of ONNX Runtime's
// CPU provider, by its C API.
//
// ONNX Runtime finds `RegisterCustomOps`. Session config entries pick levels. `vlrt.simd`, of the first two: "auto",
// the default, is the best one that computes in fp32 throughout, "auto-bf16" may be one with products in bf16, of
// attention. `vlrt.int8`, of linear layers with weights of 8 or 4 bits, and `vlrt.fp32`, of those with floats: "auto",
// the default, and for the latter "auto-bf16"; where there is none, or it is "none", ONNX Runtime takes the bodies. No
// exception leaves this file; what is wrong with an input is said in an OrtStatus.

#include <atomic>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "context.h"
#include "linear_ops.h"

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

// ONNX Runtime keeps the pointer and calls through the fields of the base.
struct Op : OrtCustomOp {
  using Make = std::function<std::unique_ptr<vlrt::Kernel>(const OrtKernelInfo*)>;

  std::string name;
  std::vector<ONNXTensorElementDataType> inputs;
  std::size_t num_outputs;
  Make make;

  Op(std::string op_name, std::vector<ONNXTensorElementDataType> op_inputs, std::size_t op_num_outputs, Make op_make)
      : OrtCustomOp{},
        name(std::move(op_name)),
        inputs(std::move(op_inputs)),
        num_outputs(op_num_outputs),
        make(std::move(op_make)) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).name.c_str(); };
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
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
      return guarded([&] {
        *kernel = self(op).make(info).release();
        ++num_kernels;
      });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<vlrt::Kernel*>(kernel); };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      return guarded([&] { static_cast<vlrt::Kernel*>(kernel)->run(context); });
    };
  }

  static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
};

// A kernel without a state of its own.
class Plain : public vlrt::Kernel {
 public:
  using Run = void (*)(const vlrt::Level&, OrtKernelContext*);

  Plain(Run run, const vlrt::Level& level) : run_(run), level_(level) {}
  void run(OrtKernelContext* context) override { run_(level_, context); }

 private:
  Run run_;
  const vlrt::Level& level_;
};

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

std::vector<ONNXTensorElementDataType> attention_inputs(std::size_t num_floats) {
  std::vector<ONNXTensorElementDataType> inputs(num_floats, kFloat);
  inputs.push_back(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
  return inputs;
}

// Levels of attention and of linear layers; null: none.
struct Levels {
  bool operator<(const Levels& other) const {
    return std::tie(attention, int8, fp32) < std::tie(other.attention, other.int8, other.fp32);
  }

  const vlrt::Level* attention;
  const vlrt::LinearLevel* int8;
  const vlrt::DenseLevel* fp32;
};

// The ops of one level of each kind.
struct Domain {
  explicit Domain(const Levels& levels) {
    check(api->CreateCustomOpDomain("vlrt", &domain));
    add("VideoAttention", attention_inputs(7), 3, plain(vlrt::run_video_attention, *levels.attention));
    auto lane_inputs = attention_inputs(7);
    lane_inputs.push_back(kFloat);
    add("LaneAttention", std::move(lane_inputs), 3, plain(vlrt::run_lane_attention, *levels.attention));
    add("SegmentAttention", attention_inputs(5), 1, plain(vlrt::run_segment_attention, *levels.attention));
    add("LatentInjection", std::vector<ONNXTensorElementDataType>(10, kFloat), 1,
        [&level = *levels.attention](const OrtKernelInfo* info) { return vlrt::make_latent_injection(level, info); });
    for (const vlrt::LinearVariant& variant : vlrt::kLinearVariants) {
      if (levels.fp32 != nullptr && !variant.norm)
        add_linear(variant, vlrt::kFloatFormat, [&variant, level = levels.fp32](const OrtKernelInfo* info) {
          return std::make_unique<vlrt::LinearKernel>(variant, *level, info);
        });
      for (const vlrt::Format* format : {&vlrt::kInt8Format, &vlrt::kFourBitFormat})
        if (levels.int8 != nullptr)
          add_linear(variant, *format, [&variant, format, level = levels.int8](const OrtKernelInfo* info) {
            return std::make_unique<vlrt::LinearKernel>(variant, *level, info, *format);
          });
    }
  }

  static Op::Make plain(Plain::Run run, const vlrt::Level& level) {
    return [run, &level](const OrtKernelInfo*) { return std::make_unique<Plain>(run, level); };
  }

  void add_linear(const vlrt::LinearVariant& variant, const vlrt::Format& format, Op::Make make) {
    add(std::string(format.prefix) + variant.name, vlrt::linear_inputs(variant, format), variant.num_outputs(),
        std::move(make));
  }

  void add(std::string name, std::vector<ONNXTensorElementDataType> inputs, std::size_t num_outputs, Op::Make make) {
    ops.push_back(std::make_unique<Op>(std::move(name), std::move(inputs), num_outputs, std::move(make)));
    check(api->CustomOpDomain_Add(domain, ops.back().get()));
  }

  std::vector<std::unique_ptr<Op>> ops;
  OrtCustomOpDomain* domain = nullptr;
};

// Sessions refer to a domain for as long as they live, so there is one per set of levels, and it is never freed.
OrtCustomOpDomain* domain_of(const Levels& levels) {
  static std::mutex mutex;
  static std::map<Levels, Domain*> made;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& found = made[levels];
  if (found == nullptr) found = new Domain(levels);
  return found->domain;
}

// Returns the value of a session config entry; "auto" where there is none.
std::string chosen(const OrtSessionOptions* options, const char* entry) {
  int given = 0;
  check(api->HasSessionConfigEntry(options, entry, &given));
  if (given == 0) return "auto";
  std::size_t size = 0;
  check(api->GetSessionConfigEntry(options, entry, nullptr, &size));
  std::string name(size, '\0');
  check(api->GetSessionConfigEntry(options, entry, name.data(), &size));
  return name.c_str();  // without the terminating zero
}

}  // namespace

#define VLRT_EXPORT extern "C" __attribute__((visibility("default")))

VLRT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  api = base->GetApi(kApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "libvlrt_ort needs ONNX Runtime 1.17 or newer");
  return guarded([&] {
    const auto pick = [&](const char* entry, auto find, bool optional) {
      const std::string name = chosen(options, entry);
      const auto* found = find(name.c_str());
      if (found == nullptr && !(optional && (name == "auto" || name == "auto-bf16" || name == "none")))
        throw std::runtime_error(std::string(entry) + " is '" + name + "', which this processor does not have");
      return found;
    };
    check(api->AddCustomOpDomain(options, domain_of({pick("vlrt.simd", vlrt::find_level, false),
                                                     pick("vlrt.int8", vlrt::find_linear_level, true),
                                                     pick("vlrt.fp32", vlrt::find_dense_level, true)})));
  });
}

// Returns the name of the level that is meant, such as by "auto"; null where this processor does not have it.
VLRT_EXPORT const char* vlrt_level(const char* level) {
  const vlrt::Level* found = vlrt::find_level(level);
  return found == nullptr ? nullptr : found->name;
}

// Returns the level that "auto" means for weights of 8 and 4 bits on this processor, or "none"; of one that is named:
// it, or "none".
VLRT_EXPORT const char* vlrt_int8(const char* name) {
  const vlrt::LinearLevel* found = vlrt::find_linear_level(name);
  return found == nullptr ? "none" : found->name;
}

// Likewise of fp32 linear layers.
VLRT_EXPORT const char* vlrt_fp32(const char* name) {
  const vlrt::DenseLevel* found = vlrt::find_dense_level(name);
  return found == nullptr ? "none" : found->name;
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
