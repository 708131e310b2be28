// Only in the emulated library: the order in which blocks and threads run, see simt.h.
#include "simt.h"

GADCORE_EXPORT void gadcore_emulation_seed(std::uint64_t seed) { simt::seed = seed; }
