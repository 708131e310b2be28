#include "levels.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string>

namespace gadcore {
namespace {

constexpr const char* kNames[kLevels] = {"scalar", "baseline", "avx2", "avx512", "wide"};

// ATen's table of what the CPU has.
bool has(const char* feature) {
  static const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find(feature);
  return found != capabilities.end() && found->second.isBool() && found->second.toBool();
}

Level torchs_choice() {
#ifdef GADCORE_X86
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return kAvx512;
  if (capability.rfind("AVX2", 0) == 0) return kAvx2;
#endif
  return kBaseline;
}

bool can_run(Level wanted) {
#ifdef GADCORE_X86
  if (wanted == kAvx2 || wanted == kWide) return has("avx2") && has("fma3");
  if (wanted == kAvx512) return has("avx512_f") && has("avx512_dq") && has("avx512_vl") && has("avx512_bw");
#endif
  return wanted == kScalar || wanted == kBaseline;
}

std::atomic<Level>& chosen_level() {
  static std::atomic<Level> value{torchs_choice()};
  return value;
}

// Without these instructions MKL's bfloat16 product is far slower than its float32 one.
bool bf16_by_default() {
  return bf16_gemm_linked() && torchs_choice() == kAvx512 && (has("amx_bf16") || has("avx512_bf16"));
}

std::atomic<bool>& chosen_products() {
  static std::atomic<bool> value{bf16_by_default()};
  return value;
}

// For tests: whether bfloat16 heads use the bfloat16 product, null for the CPU's own choice. Returns the answer.
bool set_bf16_products(std::optional<bool> wanted) {
  TORCH_CHECK(!wanted.value_or(false) || bf16_gemm_linked(), "_cpu_bf16_products: this torch has no such product");
  chosen_products() = wanted.value_or(bf16_by_default());
  return chosen_products();
}

// For tests: the level of all ops from now on, "" for torch's choice. Returns its name.
std::string set_level(const std::string& name) {
  Level wanted = torchs_choice();
  if (!name.empty()) {
    int i = 0;
    while (i < kLevels && name != kNames[i]) ++i;
    TORCH_CHECK(i < kLevels, "_cpu_level: no level ", name);
    wanted = static_cast<Level>(i);
    TORCH_CHECK(can_run(wanted), "_cpu_level: this CPU does not run ", name);
  }
  chosen_level() = wanted;
  return kNames[wanted];
}

}  // namespace

bool bf16_products() { return chosen_products().load(std::memory_order_relaxed); }

Level level() { return chosen_level().load(std::memory_order_relaxed); }

}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("_cpu_level(str name) -> str", &gadcore::set_level);
  m.def("_cpu_bf16_products(bool? wanted) -> bool", &gadcore::set_bf16_products);
}
