#include "wanted_nodes.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

namespace imatrix {
namespace {

bool is_matmul(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
}

// plain_name() without a copy: where the weight's own name starts and how long it is
std::pair<const char *, size_t> name_span(const char * name) {
    const char * hash = std::strchr(name, '#');
    if (hash == nullptr) {
        return {name, std::strlen(name)};
    }
    const char * start = hash + 1;
    const char * end   = std::strchr(start, '#');
    return {start, end == nullptr ? std::strlen(start) : static_cast<size_t>(end - start)};
}

bool is_wanted(const char * name, Wanted wanted) {
    const auto [start, length] = name_span(name);
    if (length > 4 && std::memcmp(start, "blk.", 4) == 0) {
        return true;
    }
    // gemma4-assistant has projections that belong to no block
    if (length > 6 && std::memcmp(start, "nextn.", 6) == 0) {
        return true;
    }
    // In deepseek4 and qwen4exp these bring the trunk's hyper-connection streams together.
    // deepseek4's head multiplies them too; a head in a file of its own has others of that name.
    if (!wanted.head && length > 10 && std::memcmp(start, "output_hc_", 10) == 0) {
        return true;
    }
    // a model without an output.weight multiplies its token embedding instead
    return wanted.output_weight && (std::string_view(start, length) == "output.weight" ||
                                    std::string_view(start, length) == "token_embd.weight");
}

} // namespace

Shape shape_of(const ggml_tensor * node) {
    const ggml_tensor * weight = node->src[0];
    Shape               shape;
    shape.n_in     = node->src[1]->ne[0];
    shape.n_mat    = weight->ne[2] * weight->ne[3];
    shape.n_counts = node->op == GGML_OP_MUL_MAT_ID ? shape.n_mat : 1;
    return shape;
}

int64_t rows_of(const ggml_tensor * node) {
    if (node->op == GGML_OP_MUL_MAT_ID) {
        return ggml_nelements(node->src[2]);
    }
    return ggml_nrows(node->src[1]) / (node->src[0]->ne[2] * node->src[0]->ne[3]);
}

bool has_rows(const ggml_tensor * node, Wanted wanted) {
    return is_matmul(node) && node->src[1]->type == GGML_TYPE_F32 &&
           is_wanted(node->src[0]->name, wanted) && rows_of(node) > 0;
}

bool has_effect(const ggml_tensor * node) {
    return node->op == GGML_OP_CPY || node->op == GGML_OP_SET_ROWS || node->op == GGML_OP_SET ||
           node->op == GGML_OP_ACC;
}

std::string plain_name(const char * name) {
    const auto [start, length] = name_span(name);
    return std::string(start, length);
}

std::vector<PlannedWeight> planned_weights(ggml_cgraph * graph, Wanted wanted,
                                           const std::string & prefix) {
    std::vector<PlannedWeight> plan;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!is_matmul(node) || node->src[1]->type != GGML_TYPE_F32 ||
            !is_wanted(node->src[0]->name, wanted)) {
            continue;
        }
        const std::string name = prefix + plain_name(node->src[0]->name);
        const auto known = std::find_if(plan.begin(), plan.end(),
                                        [&](const PlannedWeight & w) { return w.name == name; });
        if (known != plan.end()) {
            known->rows += rows_of(node);
        } else {
            plan.push_back({name, rows_of(node)});
        }
    }
    return plan;
}

GraphEnd end_of(ggml_cgraph * graph, Wanted wanted) {
    GraphEnd end;
    bool     later = false;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (has_rows(node, wanted)) {
            ++end.n_wanted;
            later = false;
            continue;
        }
        if (has_effect(node)) {
            ++end.n_effects;
            later = true;
        }
        // Other splits still run, on what was never computed: numbers that no row may be
        // looked up by.
        later |= node->op == GGML_OP_MUL_MAT_ID ||
                 (node->op == GGML_OP_GET_ROWS && node->src[1]->op != GGML_OP_NONE);
    }
    return later ? GraphEnd{} : end;
}

void list_rows_of_matrices(const ggml_tensor * w, const ggml_tensor * x, RowNumbers & out) {
    out.resize(std::max(out.size(), static_cast<size_t>(w->ne[2] * w->ne[3])));
    for (int64_t w3 = 0; w3 < w->ne[3]; ++w3) {
        for (int64_t w2 = 0; w2 < w->ne[2]; ++w2) {
            std::vector<int32_t> & rows = out[static_cast<size_t>(w3 * w->ne[2] + w2)];
            rows.clear();
            for (int64_t i3 = w3; i3 < x->ne[3]; i3 += w->ne[3]) {
                for (int64_t i2 = w2; i2 < x->ne[2]; i2 += w->ne[2]) {
                    for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                        rows.push_back(static_cast<int32_t>((i3 * x->ne[2] + i2) * x->ne[1] + i1));
                    }
                }
            }
        }
    }
}

bool list_rows_of_experts(const ggml_tensor * w, const ggml_tensor * x,
                          const std::vector<int32_t> & experts, int64_t n_used, RowNumbers & out,
                          int32_t & bad) {
    out.resize(std::max(out.size(), static_cast<size_t>(w->ne[2] * w->ne[3])));
    for (std::vector<int32_t> & rows : out) {
        rows.clear();
    }
    for (int64_t token = 0; token < x->ne[2]; ++token) {
        for (int64_t used = 0; used < n_used; ++used) {
            const int32_t expert = experts[static_cast<size_t>(token * n_used + used)];
            if (expert < 0 || expert >= w->ne[2]) {
                bad = expert;
                return false;
            }
            out[static_cast<size_t>(expert)].push_back(
                static_cast<int32_t>(token * x->ne[1] + used % x->ne[1]));
        }
    }
    return true;
}

} // namespace imatrix
