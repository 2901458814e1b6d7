// Looks, before a graph runs, for what the engine would assert only while it runs.
#pragma once

#include "status.h"

struct ggml_cgraph;

namespace imatrix {

// bad_model names a tensor if its type is one that an operation has no code for, or if an operation
// refuses a parameter from the metadata: each would end the process (ggml/src/ggml-cpu).
Status check_graph(ggml_cgraph * graph);

} // namespace imatrix
