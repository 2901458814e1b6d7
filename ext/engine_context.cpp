#include "engine_context.h"

#include "engine_log.h"
#include "live.h"

#include "llama.h"

#include <algorithm>

namespace imatrix {

void FreeContext::operator()(llama_context * ctx) const {
    llama_free(ctx);
    --g_live_contexts;
}
void FreeBatch::operator()(llama_batch_ext * batch) const { llama_batch_ext_free(batch); }

bool is_causal(const llama_context * ctx) {
    // a context without a memory encodes, without a causal mask, whatever the metadata say
    // (llama-context.cpp, llama_context::encode)
    return llama_get_causal_attn(ctx) && llama_get_memory(ctx) != nullptr;
}

Status make_engine_context(llama_model * model, const EngineContextParams & params,
                           ContextPtr & out) {
    clear_error();
    llama_context_params engine = llama_context_default_params();
    engine.n_ctx                = static_cast<uint32_t>(params.n_ctx);
    engine.n_batch              = static_cast<uint32_t>(params.n_batch);
    engine.n_ubatch             = static_cast<uint32_t>(std::min(params.n_ubatch, params.n_batch));
    engine.n_seq_max            = static_cast<uint32_t>(params.n_seq);
    engine.n_outputs_max        = static_cast<uint32_t>(params.n_outputs);
    engine.n_threads            = params.n_threads;
    engine.n_threads_batch      = params.n_threads;
    engine.no_perf              = true;
    // A cache of experts in device memory puts its own tensor and ids into MUL_MAT_ID, and rows
    // would then be counted for the wrong experts (src/llama-moe-cache.cpp).
    engine.moe_cache_size = 0;
    engine.abort_callback = [](void * data) -> bool {
        return static_cast<std::atomic<bool> *>(data)->load(std::memory_order_relaxed);
    };
    engine.abort_callback_data = params.cancelled;
    engine.cb_eval             = params.on_node.call;
    engine.cb_eval_user_data   = params.on_node.data;
    if (!params.computes) {
        // the engine asks before the first node, when all else of a decode is done
        // (ggml-backend.cpp)
        engine.cb_eval = [](ggml_tensor *, bool, void *) -> bool {
            throw NothingComputed{};
        };
    }
    if (params.trunk != nullptr) {
        engine.ctx_type  = LLAMA_CONTEXT_TYPE_MTP;
        engine.ctx_other = params.trunk;
    }
    if (params.branch_cells >= 0) {
        engine.kv_unified = true;
        engine.n_seq_max += kSlotsTogether;
        engine.n_ctx += static_cast<uint32_t>(params.branch_cells);
    }
    // the engine asserts that every sequence may have one (llama_context::output_reserve)
    engine.n_outputs_max = std::max(engine.n_outputs_max, engine.n_seq_max);
    const auto init      = [&] {
        out.reset(llama_init_from_model(model, engine));
        g_live_contexts += out == nullptr ? 0 : 1;
    };
    init();
    // without a memory every token is an output (llama_context::encode), whether or not asked for
    if (out != nullptr && llama_get_memory(out.get()) == nullptr &&
        engine.n_outputs_max < engine.n_batch) {
        engine.n_outputs_max = engine.n_batch;
        out.reset();
        init();
    }
    if (out == nullptr) {
        return engine_error(Code::engine_failed, params.trunk != nullptr
                                                     ? "the engine made no MTP context"
                                                     : "the engine made no context");
    }
    // The engine would end the process on a larger decode, and in smaller ones tokens would not see
    // all that they should.
    if (!is_causal(out.get()) && engine.n_ubatch < static_cast<uint32_t>(params.n_whole)) {
        out.reset();
        return Status::failed(Code::bad_argument,
                              "tokens of this model see those after them: n_batch and n_ubatch "
                              "must be " +
                                  std::to_string(params.n_whole) + " or more");
    }
    return {};
}

} // namespace imatrix
