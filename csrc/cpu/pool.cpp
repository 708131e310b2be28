// The memory pool of CPU tensors: activations, gradients and temporary buffers of a training step; gadcore/memory/pool.py.
//
// malloc gives a step's memory back and takes it anew, page by page, and torch's aligned requests seldom fit the holes that
// freed tensors of the same size have left. Here freed memory stays, in large pages, holes merge and are reused exactly,
// and memory is given back by release(), and where a large tensor of malloc's takes as much.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace gadcore {
namespace {

#ifdef __linux__

constexpr size_t kPage = 4096;
constexpr size_t kLargePage = size_t{2} << 20;
// Smaller tensors are malloc's, larger ones too: those it maps and unmaps one by one, so that what holdings free is free.
constexpr size_t kSmallest = size_t{64} << 10;
constexpr size_t kLargest = size_t{64} << 20;
// So much of holes is given back before the pool reaches further.
constexpr size_t kHoles = size_t{64} << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Addresses of one reserved range, handed out best fit first, of equals the lowest.
class Range {
 public:
  // False where the system does not reserve so much.
  bool reserve() {
    const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = round_up(2 * memory, kLargePage);
    void* at = mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return false;
    begin_ = round_up(reinterpret_cast<uintptr_t>(at), kLargePage);
    end_ = begin_ + bytes;
    top_ = begin_;
    // Advice: where there are no large pages, small ones do.
    madvise(reinterpret_cast<void*>(begin_), bytes, MADV_HUGEPAGE);
    insert(begin_, bytes);
    return true;
  }

  bool owns(const void* p) const {
    const auto at = reinterpret_cast<uintptr_t>(p);
    return at >= begin_ && at < end_;
  }

  // nullptr where nothing is left that is long enough.
  void* take(size_t n) {
    n = round_up(n, kPage);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto best = by_size_.lower_bound({n, 0});
    if (best == by_size_.end()) return nullptr;
    const auto [size, at] = *best;
    // None of the holes fits: they come back one by one where they do.
    if (at + n > top_ && top_ - begin_ >= in_use_ + kHoles) give_back_holes(kLargePage);
    erase(at, size);
    if (size > n) insert(at + n, size - n);
    used_[at] = n;
    in_use_ += n;
    top_ = std::max(top_, at + n);
    return reinterpret_cast<void*>(at);
  }

  void give(void* p) {
    auto at = reinterpret_cast<uintptr_t>(p);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(at);
    TORCH_INTERNAL_ASSERT(found != used_.end(), "the pool was given memory that it had not handed out");
    size_t n = found->second;
    used_.erase(found);
    in_use_ -= n;
    auto next = by_address_.lower_bound(at);
    if (next != by_address_.end() && next->first == at + n) {
      const auto [address, size] = *next;
      erase(address, size);
      n += size;
    }
    auto after = by_address_.lower_bound(at);
    if (after != by_address_.begin()) {
      const auto [address, size] = *--after;
      if (address + size == at) {
        erase(address, size);
        at = address;
        n += size;
      }
    }
    insert(at, n);
  }

  // Gives back whole pages of this size that no tensor uses.
  void release(size_t page) {
    const std::lock_guard<std::mutex> lock(mutex_);
    give_back_holes(page);
  }

  // Bytes in use, and bytes up to the highest that was in use since the last release().
  std::pair<int64_t, int64_t> sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(in_use_), static_cast<int64_t>(top_ - begin_)};
  }

 private:
  void give_back_holes(size_t page) {
    for (const auto& [at, size] : by_address_) {
      const uintptr_t begin = round_up(at, page), end = std::min(at + size, round_up(top_, page)) / page * page;
      if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
    top_ = begin_;
    for (const auto& [at, size] : used_) top_ = std::max(top_, at + size);
  }

  void insert(uintptr_t at, size_t size) {
    by_size_.emplace(size, at);
    by_address_.emplace(at, size);
  }
  void erase(uintptr_t at, size_t size) {
    by_size_.erase({size, at});
    by_address_.erase(at);
  }

  std::mutex mutex_;
  uintptr_t begin_ = 0, end_ = 0, top_ = 0;
  size_t in_use_ = 0;
  std::set<std::pair<size_t, uintptr_t>> by_size_;
  std::map<uintptr_t, size_t> by_address_;
  std::unordered_map<uintptr_t, size_t> used_;
};

// Neither is ever freed: tensors may outlive everything else of a process.
Range& range() {
  static Range& it = *new Range;
  return it;
}

c10::Allocator& fallback() {
  static c10::Allocator& it = *c10::GetDefaultCPUAllocator();
  return it;
}

struct Pool final : c10::Allocator {
  static void free(void* p) {
    if (p == nullptr) return;
    if (!range().owns(p)) {
      fallback().raw_deleter()(p);
      return;
    }
    c10::profiledCPUMemoryReporter().Delete(p);
    range().give(p);
  }

  c10::DataPtr allocate(size_t n) override {
    // What is malloc's must not come on top of holes. Their large pages stay whole: small ones would be slow to fill.
    if (n > kLargest) range().release(kLargePage);
    void* p = n >= kSmallest && n <= kLargest ? range().take(n) : nullptr;
    if (p == nullptr) {
      p = fallback().raw_allocate(n);
    } else {
      c10::profiledCPUMemoryReporter().New(p, n);
    }
    return {p, p, &free, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

bool install() {
  static const bool done = [] {
    if (!range().reserve()) return false;
    // Before anything is allocated by it: its deleter asks for it.
    fallback();
    c10::SetCPUAllocator(new Pool);
    return true;
  }();
  return done;
}

void release() { range().release(kPage); }

std::tuple<int64_t, int64_t> sizes() {
  const auto [used, touched] = range().sizes();
  return {used, touched};
}

#else

bool install() { return false; }
void release() {}
std::tuple<int64_t, int64_t> sizes() { return {0, 0}; }

#endif

}  // namespace
}  // namespace gadcore

TORCH_LIBRARY_FRAGMENT(gadcore, m) {
  m.def("_cpu_pool_install() -> bool", &gadcore::install);
  m.def("_cpu_pool_release() -> ()", &gadcore::release);
  m.def("_cpu_pool_sizes() -> (int, int)", &gadcore::sizes);
}
