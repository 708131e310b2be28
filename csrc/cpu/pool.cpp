// The memory pool of CPU tensors: activations, gradients and temporary buffers of a training step; gadcore/cpu/pool.py.
//
// malloc gives a step's memory back and takes it anew, page by page, and torch's aligned requests seldom fit the holes that
// freed tensors of the same size have left. Here freed memory stays, in large pages, and holes merge and are reused exactly.
// Memory is given back by release(), and where the pool would otherwise hold more than it ever has since: to take a GiB
// anew costs about 0.1 s, and on a virtual machine that has returned it to its host, 1 to 2 s.
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
#include <vector>

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
// So much of holes is given back before the pool and the larger tensors hold more than ever.
constexpr size_t kHoles = size_t{16} << 20;

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
    held_.assign(bytes / kLargePage, false);
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
    make_room(missing(at, n));
    erase(at, size);
    if (size > n) insert(at + n, size - n);
    used_[at] = n;
    in_use_ += n;
    hold(at, n);
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

  // A tensor of malloc's comes, p, which goes by forget().
  void note(void* p, size_t n) {
    const std::lock_guard<std::mutex> lock(mutex_);
    make_room(n);
    others_[p] = n;
    others_bytes_ += n;
    most_ = std::max(most_, bytes_ + others_bytes_);
  }

  void forget(void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = others_.find(p);
    if (found == others_.end()) return;
    others_bytes_ -= found->second;
    others_.erase(found);
  }

  // Gives back every page that no tensor uses.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    give_back_holes(kPage);
    most_ = bytes_ + others_bytes_;
  }

  // Bytes in use, and bytes of the large pages that are held.
  std::pair<int64_t, int64_t> sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(in_use_), static_cast<int64_t>(bytes_)};
  }

 private:
  size_t page_of(uintptr_t at) const { return (at - begin_) / kLargePage; }

  // Bytes of large pages that n bytes from `at` on need and that are not held.
  size_t missing(uintptr_t at, size_t n) const {
    size_t pages = 0;
    for (size_t p = page_of(at); p <= page_of(at + n - 1); ++p) pages += !held_[p];
    return pages * kLargePage;
  }

  // Before `more` bytes are held. The large pages of holes stay whole: small ones would be slow to fill.
  void make_room(size_t more) {
    if (bytes_ + others_bytes_ + more > most_ && bytes_ >= in_use_ + kHoles) give_back_holes(kLargePage);
  }

  void hold(uintptr_t at, size_t n) {
    bytes_ += missing(at, n);
    most_ = std::max(most_, bytes_ + others_bytes_);
    std::fill(held_.begin() + page_of(at), held_.begin() + page_of(at + n - 1) + 1, true);
  }

  void give_back_holes(size_t page) {
    for (const auto& [at, size] : by_address_) {
      const uintptr_t end = (at + size) / page * page;
      for (uintptr_t from = round_up(at, page), to; from < end; from = to) {
        const size_t p = page_of(from);
        to = std::min(end, begin_ + (p + 1) * kLargePage);
        if (!held_[p]) continue;
        madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
        if (to - from < kLargePage) continue;
        held_[p] = false;
        bytes_ -= kLargePage;
      }
    }
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
  uintptr_t begin_ = 0, end_ = 0;
  // Large pages with something in them, their bytes, and those of tensors.
  std::vector<bool> held_;
  size_t bytes_ = 0, in_use_ = 0;
  // Larger tensors that malloc holds, and the most that they and the pool held since release().
  std::unordered_map<void*, size_t> others_;
  size_t others_bytes_ = 0, most_ = 0;
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
      range().forget(p);
      fallback().raw_deleter()(p);
      return;
    }
    c10::profiledCPUMemoryReporter().Delete(p);
    range().give(p);
  }

  c10::DataPtr allocate(size_t n) override {
    void* p = n >= kSmallest && n <= kLargest ? range().take(n) : nullptr;
    if (p == nullptr) {
      p = fallback().raw_allocate(n);
      if (n > kLargest) range().note(p, n);
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

void release() { range().release(); }

std::tuple<int64_t, int64_t> sizes() {
  const auto [used, held] = range().sizes();
  return {used, held};
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
