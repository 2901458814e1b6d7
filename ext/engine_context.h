// One context of the engine, with the settings that every context here has.
#pragma once

#include "status.h"

#include <atomic>
#include <cstdint>
#include <memory>

struct ggml_tensor;
struct llama_batch_ext;
struct llama_context;
struct llama_model;

namespace imatrix {

// A decode throws it instead of computing, see EngineContextParams::computes.
struct NothingComputed {};

// Slots that run side by side, each in a sequence of its own that branches off the text's.
inline constexpr int32_t kSlotsTogether = 64;

struct FreeContext {
    void operator()(llama_context * ctx) const;
};
struct FreeBatch {
    void operator()(llama_batch_ext * batch) const;
};
using ContextPtr = std::unique_ptr<llama_context, FreeContext>;
using BatchPtr   = std::unique_ptr<llama_batch_ext, FreeBatch>;

// ggml_backend_sched_eval_callback and its user_data
struct EvalCallback {
    bool (*call)(ggml_tensor * node, bool ask, void * data) = nullptr; // NULL: nobody looks
    void * data                                             = nullptr;
};

struct EngineContextParams {
    int32_t n_ctx     = 0; // tokens of all sequences, without the branches' own cells
    int32_t n_batch   = 0; // tokens a decode
    int32_t n_ubatch  = 0; // tokens a graph, if that is less
    int32_t n_seq     = 1;
    int32_t n_outputs = 1; // rows whose logits a decode may ask for: every graph has room for them
    int32_t n_threads = 1;
    // tokens that one decode and one graph must hold if tokens see those after them
    int32_t n_whole = 0;
    // If it is not negative, there are kSlotsTogether more sequences, which share cells of the
    // first one, and this many cells for what they do not share.
    int32_t             branch_cells = -1;
    llama_context *     trunk        = nullptr; // given: an MTP context is made, which refers to it
    EvalCallback        on_node;
    std::atomic<bool> * cancelled = nullptr; // ends decodes early, from any thread
    // false: a decode throws NothingComputed once its graph is built, allocated and fed
    bool computes = true;
};

// Whether a token sees only those before it, so that a text may be decoded part by part.
bool is_causal(const llama_context * ctx);

Status make_engine_context(llama_model * model, const EngineContextParams & params,
                           ContextPtr & out);

} // namespace imatrix
