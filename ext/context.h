// The engine's contexts as a session and an evaluator make them.
#pragma once

#include "status.h"

#include <atomic>
#include <cstdint>
#include <memory>

struct llama_context;
struct llama_batch_ext;

namespace imatrix {

class EvalHook;
class Model;

// Thrown instead of computing anything, see ContextParams::computes.
struct NothingComputed {};

// Tokens in a graph that is only looked at. Prime, so that a layer cropped to its output rows
// cannot look like one that keeps them all.
inline constexpr int32_t kProbeTokens = 61;

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

struct ContextParams {
    int32_t n_ctx     = 0; // tokens of all sequences, but for the branches' own cells
    int32_t n_batch   = 0; // tokens a decode
    int32_t n_ubatch  = 0; // tokens a graph, if fewer
    int32_t n_seq     = 1;
    int32_t n_outputs = 1; // rows whose logits a decode may ask for: every graph has room for them
    int32_t n_threads = 1;
    // tokens that one decode and one graph must hold where tokens see those after them
    int32_t n_whole = 0;
    // kSlotsTogether sequences more that share the cells of the first one, and this many cells for
    // what they do not share; negative for no such sequences
    int32_t             branch_cells = -1;
    llama_context *     trunk        = nullptr; // of a head's context: makes that an MTP context
    EvalHook *          hook         = nullptr;
    std::atomic<bool> * cancelled    = nullptr; // ends decodes early, from any thread
    // false: a decode throws NothingComputed once its graph is built, allocated and fed
    bool computes = true;
};

// Whether a token sees only those before it, so that a text may be decoded part by part.
bool is_causal(const llama_context * ctx);

Status make_context(const Model & model, const ContextParams & params, ContextPtr & out);

} // namespace imatrix
