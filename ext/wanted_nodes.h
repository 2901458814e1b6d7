// The nodes of a graph that multiply a wanted weight: which they are, how many rows each gets, and
// where a graph may be left because none is to come.
#pragma once

#include "sums.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;
struct ggml_cgraph;

namespace imatrix {

// How many rows a graph feeds a wanted weight, read off the graph without running it.
struct PlannedWeight {
    std::string name;
    int64_t     rows = 0; // rows, or (row, expert) pairs
};

// Which weights are wanted beside those of blocks.
struct Wanted {
    bool output_weight = false; // the LM head's
    // Of a head's graph, weights at the end of the trunk (output_hc_*) are not wanted.
    bool head = false;
};

// `prefix` is put before every name.
std::vector<PlannedWeight> planned_weights(ggml_cgraph * graph, Wanted wanted,
                                           const std::string & prefix);

// Where a graph may be left: after it has run so many nodes that multiply a wanted weight, and so
// many that have an effect which outlives the graph (keys, values, states). A backend may run its
// nodes in another order than the model built them (graph_optimize in ggml-vulkan.cpp and
// ggml-metal-common.cpp), so that the last weight alone would not do.
struct GraphEnd {
    int64_t n_wanted  = 0; // 0: nowhere
    int64_t n_effects = 0;
};
// Nowhere if something after the last wanted weight, as the model built it, has such an effect or
// looks up rows by numbers that the graph computes.
GraphEnd end_of(ggml_cgraph * graph, Wanted wanted);

// "CUDA0#blk.0.attn_k.weight#0" -> "blk.0.attn_k.weight"; other names stay.
// The scheduler decorates copies of tensors this way (ggml-backend.cpp).
std::string plain_name(const char * name);

// A multiplication that is wanted and has rows. A last layer that is cropped to no output rows has
// none.
bool has_rows(const ggml_tensor * node, Wanted wanted);
// Whether a node writes to what outlives the graph.
bool has_effect(const ggml_tensor * node);

// Of a multiplication: the shape of its weight's sums, and the rows that it feeds the weight, per
// matrix for a dense weight, in all for experts.
Shape   shape_of(const ggml_tensor * node);
int64_t rows_of(const ggml_tensor * node);

// Numbers of an activation's rows by matrix or expert, counted with dimension 1 fastest.
using RowNumbers = std::vector<std::vector<int32_t>>;

// Matrix (i2, i3) of the weight `w` multiplies the rows of x whose own i2, i3 are the same modulo
// the weight's: ggml's broadcast rule for MUL_MAT.
void list_rows_of_matrices(const ggml_tensor * w, const ggml_tensor * x, RowNumbers & out);

// The experts of the weight `w` in `experts` [n_tokens, n_used] get the rows of their tokens: of
// gate and up a token has one row for all its experts, of down one for each. False if `w` has no
// expert of a number; `bad` is that number then.
bool list_rows_of_experts(const ggml_tensor * w, const ggml_tensor * x,
                          const std::vector<int32_t> & experts, int64_t n_used, RowNumbers & out,
                          int32_t & bad);

} // namespace imatrix
