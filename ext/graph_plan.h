// What a context's graph does with the wanted weights, found out without running it.
#pragma once

#include "status.h"
#include "wanted_nodes.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_context;

namespace imatrix {

// Tokens of a sequence in a graph that is only looked at. It is a prime, so that a layer that is
// cropped to its output rows cannot look like one that keeps them all.
inline constexpr int32_t kProbeTokens = 61;

struct GraphPlan {
    std::vector<PlannedWeight> weights; // rows a token; 0 if rows do not follow the tokens
    bool     needs_outputs = false;     // something sees only rows that an output is requested of
    bool     crops_rows    = false;     // the graph gives the next head those rows only
    bool     gives_logits  = false;
    GraphEnd end; // if outputs are requested of all rows
};

struct ProbeParams {
    int32_t     n_seq   = 1;
    int32_t     n_heads = 0; // head graphs that the context has; 0: it is the trunk's
    Wanted      wanted;
    std::string prefix;            // of a head's weights
    bool        reads_rows = true; // rows for the next head are read, so that cropping them counts
    bool        computes   = true; // false: of a model that was loaded with no_alloc
};

// bad_model if a graph holds what would end the process (graph_check.h).
Status probe(llama_context * ctx, const ProbeParams & params, GraphPlan & plan);

} // namespace imatrix
