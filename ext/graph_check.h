// What the engine would assert only while a graph runs, looked for before it runs.
#pragma once

#include "status.h"

struct ggml_cgraph;

namespace imatrix {

// Types of weights that an operation has no code for, and parameters from the metadata that it
// refuses: each would end the process (ggml/src/ggml-cpu). bad_model names the tensor.
Status check_graph(ggml_cgraph * graph);

} // namespace imatrix
