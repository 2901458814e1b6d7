// A device whose memory the host cannot read, for tests: a stand-in for a GPU.
#pragma once

#include "ggml-backend.h"

namespace imatrix::testing {

// The one device; it computes with the CPU backend, on pages that are unreadable at any other
// time. Reading its tensors without ggml_backend_tensor_get ends the process with a signal.
ggml_backend_dev_t far_device();

// From now on the device does not support an operation, by ggml_op_name(); NULL: it does all.
void far_device_refuse(const char * op);
// Whether it throws when it is to compute, as Vulkan's does when it is lost (ggml-vulkan.cpp).
void far_device_lose(bool lost);

bool far_device_protects(); // false where the pages cannot be protected (not POSIX)

} // namespace imatrix::testing
