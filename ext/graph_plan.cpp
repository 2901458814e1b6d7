#include "graph_plan.h"

#include "engine_log.h"
#include "graph_check.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-ext.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace imatrix {
namespace {

// Weights, keys and values that were given no memory (llama_model_params.no_alloc) have none that a
// view could be made of, on which the engine insists when it allocates a graph (ggml-backend.cpp,
// ggml_backend_view_init). They get an address that nothing will ever read.
void give_addresses(ggml_cgraph * graph) {
    alignas(64) static char nothing[64];
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        for (int k = -1; k < GGML_MAX_SRC; ++k) {
            ggml_tensor * tensor = k < 0 ? node : node->src[k];
            while (tensor != nullptr && tensor->view_src != nullptr) {
                tensor = tensor->view_src;
            }
            if (tensor != nullptr && tensor->buffer != nullptr && tensor->data == nullptr &&
                ggml_backend_buffer_get_size(tensor->buffer) == 0) {
                tensor->data = nothing;
            }
        }
    }
}

// What was found in graphs with one number of outputs.
struct Found {
    std::vector<PlannedWeight> weights;
    std::vector<int64_t>       rows_given; // to the next head, a graph each
};

Status look(llama_context * ctx, const ProbeParams & params, int32_t n_outputs, Found & found,
            GraphPlan & plan) {
    ggml_cgraph * graph =
        llama_graph_reserve(ctx, static_cast<uint32_t>(kProbeTokens * params.n_seq),
                            static_cast<uint32_t>(params.n_seq), static_cast<uint32_t>(n_outputs));
    if (graph == nullptr) {
        return engine_error(Code::engine_failed, "the engine could not reserve a graph");
    }
    if (!params.computes) { // reserving has taken what activations need
        give_addresses(graph);
    }
    for (PlannedWeight & weight : planned_weights(graph, params.wanted, params.prefix)) {
        found.weights.push_back(std::move(weight));
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        // what llama_get_embeddings_nextn gives; a cropped one would be read past its end
        if (std::strcmp(node->name, "h_nextn") == 0) {
            found.rows_given.push_back(node->ne[1]);
        }
    }
    plan.gives_logits = ggml_graph_get_tensor(graph, "result_output") != nullptr;
    plan.end          = end_of(graph, params.wanted); // of the last graph, with all outputs
    return check_graph(graph);
}

} // namespace

// Each graph is built twice, with one output and with all: what differs between the two is what
// only output rows reach.
Status probe(llama_context * ctx, const ProbeParams & params, GraphPlan & plan) {
    plan = {};
    // the trunk's cache has a stream a sequence, and a graph feeds all of them alike
    const int32_t n_tokens = kProbeTokens * params.n_seq;
    Found         one;
    Found         all;
    for (int32_t head = 0; head < std::max(1, params.n_heads); ++head) {
        if (params.n_heads > 0) {
            llama_set_nextn_layer_offset(ctx, head);
        }
        Status status = look(ctx, params, 1, one, plan);
        if (status.ok()) {
            status = look(ctx, params, n_tokens, all, plan);
        }
        if (!status.ok()) {
            return status;
        }
    }
    if (params.n_heads > 0) {
        llama_set_nextn_layer_offset(ctx, 0);
    }
    plan.crops_rows    = one.rows_given != all.rows_given;
    plan.needs_outputs = params.reads_rows && plan.crops_rows;
    for (const PlannedWeight & weight : all.weights) {
        plan.needs_outputs |=
            std::none_of(one.weights.begin(), one.weights.end(), [&](const PlannedWeight & other) {
                return other.name == weight.name && other.rows == weight.rows;
            });
    }
    plan.weights = std::move(all.weights);
    for (PlannedWeight & weight : plan.weights) {
        weight.rows = weight.rows % n_tokens == 0 ? weight.rows / n_tokens : 0;
    }
    return {};
}

} // namespace imatrix
