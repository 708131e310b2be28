// A matrix product for operands that others would have to rearrange first.
#pragma once

#include <ATen/core/Tensor.h>

namespace gadcore {

// Whether add_product() is faster than torch's products: with AVX-512, where MKL leaves a tenth of the CPU's FLOP/s.
bool product_is_ours();

// out (+)= a b. a: float32 [m, k] of any strides; b: float32 [k, n], and out, with contiguous rows. The order of the
// additions depends on k alone, so bits do not depend on the number of threads.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add);

}  // namespace gadcore
