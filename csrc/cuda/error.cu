// What a launcher's return value means, for the message that the wrapper raises.
#include "simt.h"

GADCORE_EXPORT const char* gadcore_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
