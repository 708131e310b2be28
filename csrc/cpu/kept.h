// Memory that stays with the process from one call of an op to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace gadcore {

// A float32 tensor of any content, for what is large and made anew by every call: in memory that an earlier such tensor
// gave back as it was freed, where that is large enough. The first touch of a page costs about as much as a whole softmax
// over it.
at::Tensor kept_memory(at::IntArrayRef shape);

}  // namespace gadcore
