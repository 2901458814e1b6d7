#include "session.h"

#include "engine_log.h"
#include "graph_check.h"
#include "row_kernels.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace imatrix {
namespace {

void init_backend_once() {
    static std::once_flag once;
    std::call_once(once, [] {
        ggml_backend_load_all();
        llama_backend_init();
    });
}

bool is_zero(const float * row, int32_t n) {
    return std::all_of(row, row + n, [](float v) { return v == 0.0f; });
}

// std::regex, which most pre-tokenizers run on (src/unicode.cpp, unicode_regex_split_stl), calls
// itself for every character of a match: 320 bytes of stack a character in libstdc++, so that 25000
// letters without a space end the process on a usual stack of 8 MiB.
constexpr size_t kStackPerByte   = 512;
constexpr size_t kCalmStretch    = 4096;    // needs no stack but the caller's
constexpr size_t kLongestStretch = 8 << 20; // 4 GiB of stack, of which only what is used is taken

// Bytes of the longest piece of a text that is all spaces, or all without.
size_t longest_stretch(const std::string & text) {
    size_t longest = 0;
    size_t length  = 0;
    bool   spaces  = false;
    for (const char c : text) {
        const bool space = c == ' ' || (c >= '\t' && c <= '\r');
        length           = space == spaces ? length + 1 : 1;
        spaces           = space;
        longest          = std::max(longest, length);
    }
    return longest;
}

#ifndef _WIN32
// Runs `work` in a thread with that much stack; false where there is none to be had.
bool with_stack(size_t bytes, const std::function<void()> & work) {
    pthread_attr_t attributes;
    pthread_t      thread;
    if (pthread_attr_init(&attributes) != 0) {
        return false;
    }
    const auto run = [](void * data) -> void * {
        (*static_cast<const std::function<void()> *>(data))();
        return nullptr;
    };
    const bool made =
        pthread_attr_setstacksize(&attributes, bytes) == 0 &&
        pthread_create(&thread, &attributes, run, const_cast<std::function<void()> *>(&work)) == 0;
    pthread_attr_destroy(&attributes);
    if (made) {
        pthread_join(thread, nullptr);
    }
    return made;
}
#endif

// Weights, keys and values that were given no memory (llama_model_params.no_alloc) have none to
// make a view of, on which the engine insists when it allocates a graph (ggml-backend.cpp,
// ggml_backend_view_init): an address for them that nothing will ever read.
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

} // namespace

Status engine_error(Code code, const std::string & what) {
    const std::string why = first_error();
    const auto        has = [&](const char * words) {
        return why.find(words) != std::string::npos;
    };
    const bool memory = has("allocate") || has("out of memory") || has("bad_alloc");
    return Status::failed(memory ? Code::out_of_memory : code,
                          why.empty() ? what : what + ": " + why);
}

// --- Model -----------------------------------------------------------------

void Model::Free::operator()(llama_model * model) const {
    llama_model_free(model);
    --g_live_models;
}

Status Model::load(const ModelParams & params) {
    init_backend_once();
    clear_error();
    llama_model_params engine = llama_model_default_params();
    engine.n_gpu_layers       = params.n_gpu_layers;
    engine.load_mode          = params.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
    engine.check_tensors      = params.check_tensors;
    if (params.no_alloc) {
        engine.no_alloc  = true;
        engine.load_mode = LLAMA_LOAD_MODE_NONE;
    }
    // without it the head's tensors are skipped as unused (src/models/*.cpp, mtp_flags)
    engine.load_mtp = params.mtp;
    EnginePlacement placement;
    Status          status = placement.set(params.placement, params.path, engine);
    if (!status.ok()) {
        return status;
    }
    model_.reset(llama_model_load_from_file(params.path.c_str(), engine));
    if (model_ == nullptr) {
        return engine_error(Code::bad_model, "the engine could not load the model");
    }
    ++g_live_models;
    return {};
}

int32_t Model::n_nextn() const { return llama_model_n_layer_nextn(model_.get()); }
int32_t Model::n_trunk() const { return llama_model_n_layer(model_.get()); }

std::string Model::token_text(int32_t token) const {
    const llama_vocab * vocab = llama_model_get_vocab(model_.get());
    if (token < 0 || token >= llama_vocab_n_tokens(vocab)) {
        return {};
    }
    return llama_vocab_get_text(vocab, token);
}

std::vector<std::pair<std::string, std::string>> Model::metadata(const std::string & prefix) const {
    const auto text = [](auto && get) {
        // the engine tells the length, and writes a final zero
        const int32_t size = get(nullptr, 0);
        std::string   out(static_cast<size_t>(std::max(size, 0)) + 1, '\0');
        get(out.data(), out.size());
        out.pop_back();
        return out;
    };
    std::vector<std::pair<std::string, std::string>> found;
    for (int32_t i = 0; i < llama_model_meta_count(model_.get()); ++i) {
        std::string key = text([&](char * out, size_t size) {
            return llama_model_meta_key_by_index(model_.get(), i, out, size);
        });
        if (key.compare(0, prefix.size(), prefix) == 0) {
            found.emplace_back(std::move(key), text([&](char * out, size_t size) {
                                   return llama_model_meta_val_str_by_index(model_.get(), i, out,
                                                                            size);
                               }));
        }
    }
    return found;
}

int32_t Model::n_ctx_train() const { return llama_model_n_ctx_train(model_.get()); }
bool    Model::has_decoder() const { return llama_model_has_decoder(model_.get()); }
bool    Model::has_encoder() const { return llama_model_has_encoder(model_.get()); }

// Only a context tells (llama_get_causal_attn): architectures and metadata both have a say
// (src/models/*.cpp, load_arch_hparams; llama-model.cpp, LLM_KV_ATTENTION_CAUSAL).
Status Model::causal(bool & out) const {
    ContextParams params;
    params.n_ctx = params.n_batch = params.n_ubatch = 1;
    ContextPtr   ctx;
    const Status status = make_context(*this, params, ctx);
    if (status.ok()) {
        out = is_causal(ctx.get());
    }
    return status;
}

int32_t Model::n_vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }
bool    Model::has_tokenizer() const {
    return llama_vocab_type(llama_model_get_vocab(model_.get())) != LLAMA_VOCAB_TYPE_NONE;
}
bool Model::add_bos() const {
    return has_tokenizer() && llama_vocab_get_add_bos(llama_model_get_vocab(model_.get()));
}
int32_t Model::bos() const { return llama_vocab_bos(llama_model_get_vocab(model_.get())); }

// The architecture whose context the engine gives its trunk's memory (llama-model.cpp,
// create_memory): the engine's driver learns it from the context it made, we need it before.
bool Model::shares_memory() const { return is_architecture("gemma4-assistant"); }

// The architectures whose memory keeps pooled keys of an indexer (llama-model.cpp, create_memory;
// the assertion is in llama_memory_hybrid_idx::seq_cp).
bool Model::copies_whole_sequences() const {
    return is_architecture("glm5-next") || is_architecture("qwen4exp");
}

bool Model::is_architecture(const char * name) const {
    char architecture[64] = "";
    llama_model_meta_val_str(model_.get(), "general.architecture", architecture,
                             sizeof architecture);
    return std::strcmp(architecture, name) == 0;
}

std::string Model::description() const {
    char text[128];
    llama_model_desc(model_.get(), text, sizeof text);
    return text;
}

Status Model::tokenize(const std::string & text, bool add_special, bool parse_special,
                       std::vector<int32_t> & out) const {
    const size_t stretch = longest_stretch(text);
    if (stretch > kLongestStretch) {
        return Status::failed(Code::bad_argument,
                              "the text has " + std::to_string(stretch) +
                                  " bytes in a row without a space, or of spaces; the engine's "
                                  "tokenizers take at most " +
                                  std::to_string(kLongestStretch) + ": break it into lines");
    }
#ifndef _WIN32
    if (stretch > kCalmStretch) {
        Status status;
        if (!with_stack((16U << 20) + stretch * kStackPerByte,
                        [&] { status = tokenize_here(text, add_special, parse_special, out); })) {
            return Status::failed(Code::out_of_memory, "no stack to tokenize " +
                                                           std::to_string(stretch) +
                                                           " bytes in a row without a space");
        }
        return status;
    }
#endif
    return tokenize_here(text, add_special, parse_special, out);
}

Status Model::tokenize_here(const std::string & text, bool add_special, bool parse_special,
                            std::vector<int32_t> & out) const {
    const llama_vocab * vocab = llama_model_get_vocab(model_.get());
    if (!has_tokenizer()) {
        return Status::failed(Code::bad_model, "the model has no tokenizer");
    }
    if (text.size() > static_cast<size_t>(INT32_MAX) - 16) {
        return Status::failed(Code::bad_argument,
                              "a text of 2 GiB or more cannot be tokenized in one piece: give it "
                              "as several strings");
    }
    // a vocabulary that lacks a byte or a token that the text needs: std::out_of_range
    try {
        const int32_t length = static_cast<int32_t>(text.size());
        out.resize(text.size() / 2 + 16);
        int32_t n = llama_tokenize(vocab, text.data(), length, out.data(),
                                   static_cast<int32_t>(out.size()), add_special, parse_special);
        if (n == INT32_MIN) {
            return Status::failed(Code::bad_argument, "the text has more than 2^31 tokens");
        }
        if (n < 0) { // the room that it needs
            out.resize(static_cast<size_t>(-n));
            n = llama_tokenize(vocab, text.data(), length, out.data(),
                               static_cast<int32_t>(out.size()), add_special, parse_special);
        }
        if (n < 0) {
            return Status::failed(Code::engine_failed, "the engine could not tokenize the text");
        }
        out.resize(static_cast<size_t>(n));
    } catch (const std::bad_alloc &) {
        return Status::failed(Code::out_of_memory, "out of memory while tokenizing");
    } catch (const std::exception & error) {
        return Status::failed(
            Code::bad_model,
            std::string("the model's vocabulary cannot make tokens of the text (") + error.what() +
                "); give token lists, or convert it again");
    }
    return {};
}

// --- Session: contexts -----------------------------------------------------

const char * Session::kernel() const { return best_row_kernel().name; }

void Session::set_hook_enabled(bool enabled) { hook_.set_enabled(enabled); }

Status Session::make_context(bool head, bool all_outputs, ContextPtr & out) {
    ContextParams params;
    // each sequence gets n_ctx tokens, rounded up as the engine would round the whole
    // (llama-context.cpp), or it would round a sequence down
    const int32_t padded = params_.n_seq > 1 ? (params_.n_ctx + 255) / 256 * 256 : params_.n_ctx;
    params.n_ctx         = padded * params_.n_seq;
    params.n_batch       = params_.n_batch;
    params.n_ubatch      = params_.n_ubatch;
    params.n_seq         = params_.n_seq;
    params.n_outputs     = all_outputs ? params_.n_batch : params_.n_seq;
    params.n_threads     = params_.n_threads;
    params.n_whole       = params_.n_ctx * params_.n_seq;
    params.computes      = params_.computes;
    params.hook          = &hook_;
    params.cancelled     = &cancelled_;
    params.trunk         = head ? trunk_.get() : nullptr;
    if (sharing_ || (head && n_heads_ > 1)) { // see run_later_head, run_sharing_head
        params.branch_cells = sharing_ ? 0 : kSlotsTogether * n_heads_;
    }
    const Status status = imatrix::make_context(head ? *head_model_ : model_, params, out);
    if (!status.ok()) {
        return status;
    }
    if (!params_.computes) {
        // a change of what is asked for plans the buffers once more, at the next decode, and again
        // takes none (llama_context::sched_reserve)
        return {};
    }
    if (!head) {
        // The trunk's rows for every token. Several architectures then also run their last
        // layer on every token without being asked for logits (e.g. src/models/qwen35.cpp,
        // glm4-moe.cpp), which spares the LM head, or the half of it that no score needs.
        llama_set_embeddings_nextn(out.get(), true, /*masked=*/false);
    } else if (n_heads_ > 1) {
        // The rows for the next head. Some architectures give them for output rows only
        // (src/models/step35.cpp, mimo2.cpp): unmasked, more would be read than there are.
        llama_set_embeddings_nextn(out.get(), true, /*masked=*/all_outputs);
    }
    return {};
}

// Builds the graph twice without running it, with one output and with all: what differs
// between the two is what only output rows reach.
Status Session::probe(llama_context * ctx, bool head, GraphPlan & plan) {
    plan                      = {};
    const bool        output  = params_.process_output && !head;
    const bool        gives_h = !head || n_heads_ > 1;
    const std::string prefix  = head && sharing_ ? kForeignHead : "";
    // the trunk's cache has a stream a sequence, and a graph feeds all of them alike
    const int32_t n_seq    = head ? 1 : params_.n_seq;
    const int32_t n_tokens = kProbeTokens * n_seq;
    Status        sound;
    const auto    add_graph = [&](int32_t n_outputs, std::vector<PlannedWeight> & weights) {
        ggml_cgraph * graph =
            llama_graph_reserve(ctx, static_cast<uint32_t>(n_tokens), static_cast<uint32_t>(n_seq),
                                static_cast<uint32_t>(n_outputs));
        if (graph == nullptr) {
            return false;
        }
        if (sound.ok()) {
            sound = check_graph(graph);
        }
        if (!params_.computes) { // and reserving has taken what activations need
            give_addresses(graph);
        }
        for (PlannedWeight & weight : planned_weights(graph, output, prefix, head)) {
            weights.push_back(std::move(weight));
        }
        plan.end = end_of(graph, output, head); // of the last graph, with all outputs
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            // what llama_get_embeddings_nextn gives; a cropped one would be read past its end
            if (gives_h && std::strcmp(node->name, "h_nextn") == 0) {
                weights.push_back({"h_nextn", node->ne[1]});
            }
        }
        return true;
    };
    std::vector<PlannedWeight> one;
    for (int32_t i = 0; i < (head ? n_heads_ : 1); ++i) {
        if (head) {
            llama_set_nextn_layer_offset(ctx, i);
        }
        if (!add_graph(1, one) || !add_graph(n_tokens, plan.weights)) {
            return engine_error(Code::engine_failed, "the engine could not reserve a graph");
        }
    }
    if (!sound.ok()) {
        return sound;
    }
    if (head) {
        llama_set_nextn_layer_offset(ctx, 0);
    }
    for (const PlannedWeight & all : plan.weights) {
        const auto same = std::find_if(one.begin(), one.end(), [&](const PlannedWeight & w) {
            return w.name == all.name && w.rows == all.rows;
        });
        plan.needs_outputs |= same == one.end();
    }
    plan.weights.erase(std::remove_if(plan.weights.begin(), plan.weights.end(),
                                      [](const PlannedWeight & w) { return w.name == "h_nextn"; }),
                       plan.weights.end());
    for (PlannedWeight & weight : plan.weights) {
        weight.rows = weight.rows % n_tokens == 0 ? weight.rows / n_tokens : 0;
    }
    return {};
}

// Where every row is asked for logits only so that the last layer runs on it, nobody reads them,
// and the graph is left after its last wanted weight. With a head the trunk's rows are read, which
// some architectures compute last.
bool Session::may_end_early() const {
    return trunk_plan_.needs_outputs && !params_.process_output && !params_.perplexity &&
           !params_.mtp && params_.leave_out_logits;
}

Status Session::open_context(bool head, bool all_outputs, ContextPtr & ctx, GraphPlan & plan) {
    Status status = make_context(head, all_outputs, ctx);
    if (!status.ok()) {
        return status;
    }
    status = probe(ctx.get(), head, plan);
    if (status.ok() && plan.needs_outputs && !all_outputs) {
        ctx.reset();
        status = make_context(head, true, ctx);
        if (status.ok() && !params_.computes) {
            status = probe(ctx.get(), head, plan); // what this one has is without addresses
        }
    }
    if (status.ok() && plan.needs_outputs && !head && !params_.mtp && params_.computes) {
        llama_set_embeddings_nextn(ctx.get(), false, false); // nobody wants them
    }
    return status;
}

Status Session::open(const SessionParams & params) {
    init_backend_once();
    head_batch_.reset();
    trunk_batch_.reset();
    head_.reset();
    trunk_.reset();
    params_ = params;
    hook_.set_device_sums(params.device_sums);
    sums_.keep_signed(params.signed_sums);
    hook_.set_threads(static_cast<size_t>(std::max(1, params.n_threads)));
    n_heads_ = 0;
    sharing_ = false;

    Status status;
    if (params.mtp && head_model_ == nullptr) {
        status = Status::failed(Code::bad_argument, "no model with a head was given");
    } else if (params.mtp && params.n_seq != 1) {
        // a decode of the head takes one sequence: keep_rows() would give a chunk's first slots
        // the rows of the chunk before it
        status = Status::failed(Code::bad_argument,
                                "a head is collected one chunk at a time: n_seq must be 1, got " +
                                    std::to_string(params.n_seq));
    }
    try {
        if (status.ok() && params.mtp) {
            sharing_  = head_model_->shares_memory();
            n_heads_  = sharing_ ? 1 : head_model_->n_nextn(); // all its blocks in one graph
            n_embd_h_ = llama_model_n_embd_out(model_.get());
        }
        if (status.ok()) {
            status = open_context(false, params.process_output || params.perplexity, trunk_,
                                  trunk_plan_);
        }
        causal_ = trunk_ == nullptr || is_causal(trunk_.get());
        if (status.ok() && params.mtp && !causal_) {
            status = Status::failed(Code::bad_argument,
                                    "a head has nothing to predict after a trunk whose tokens see "
                                    "those after them");
        }
        trunk_plan_.needs_outputs |= params.process_output;
        head_plan_ = {};
        if (status.ok() && params.mtp) {
            status = open_context(true, false, head_, head_plan_);
        }
        for (int32_t i = 0; i < n_heads_ && status.ok(); ++i) {
            const std::string block =
                sharing_ ? std::string(kForeignHead) + "blk.0."
                         : "blk." + std::to_string(head_model_->n_trunk() + i) + ".";
            const bool runs = std::any_of(head_plan_.weights.begin(), head_plan_.weights.end(),
                                          [&](const PlannedWeight & w) {
                                              return w.name.compare(0, block.size(), block) == 0;
                                          });
            if (!runs) {
                status =
                    Status::failed(Code::engine_failed,
                                   "the engine's MTP graph multiplies no weight of " + block + "*");
            }
        }
        if (status.ok()) {
            trunk_batch_.reset(llama_batch_ext_init(trunk_.get()));
            if (head_ != nullptr) {
                head_batch_.reset(llama_batch_ext_init(head_.get()));
            }
        }
    } catch (const std::bad_alloc &) {
        status = Status::failed(Code::out_of_memory, "out of memory while making the contexts");
    } catch (const std::exception & error) {
        status = Status::failed(Code::engine_failed, error.what());
    }
    if (!status.ok()) {
        head_.reset();
        trunk_.reset();
    }
    return status;
}

std::vector<MemoryUse> Session::memory() const {
    std::vector<MemoryUse>   uses;
    const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto               use = [&](ggml_backend_buffer_type_t type) -> MemoryUse & {
        // some of the host's types belong to no device
        const ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
        MemoryUse                found;
        found.host   = device == nullptr || device == cpu || ggml_backend_buft_is_host(type);
        found.device = ggml_backend_dev_name(found.host ? cpu : device);
        // other types on the host hold weights in an order of their own (ggml-cpu/repack.cpp)
        found.plain = type == ggml_backend_dev_buffer_type(cpu);
        for (MemoryUse & known : uses) {
            if (known.device == found.device && known.plain == found.plain) {
                return known;
            }
        }
        uses.push_back(found);
        return uses.back();
    };
    for (const bool head : {false, true}) {
        const llama_context * ctx = head ? head_.get() : trunk_.get();
        if (ctx == nullptr) {
            continue;
        }
        const bool own_model = !head || head_model_ != &model_;
        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            MemoryUse & found = use(type);
            found.model += own_model ? static_cast<int64_t>(bytes.model) : 0;
            found.context += static_cast<int64_t>(bytes.context);
            found.compute += static_cast<int64_t>(bytes.compute);
        }
        // What the breakdown leaves out (llama-context.cpp, output_reserve): logits of the rows
        // that are asked for them, and the trunk's rows for the head.
        const bool    all     = head ? head_plan_.needs_outputs
                                     : trunk_plan_.needs_outputs || params_.perplexity ||
                                           llama_get_memory(ctx) == nullptr; // see make_context
        const int64_t n_rows  = params_.n_batch;
        const int64_t outputs = (all ? n_rows : params_.n_seq) * model_.n_vocab();
        const int64_t hidden  = n_rows * llama_model_n_embd_out(model_.get());
        use(ggml_backend_dev_buffer_type(cpu)).compute +=
            (outputs + hidden) * static_cast<int64_t>(sizeof(float));
    }
    return uses;
}

// --- Session: one chunk ----------------------------------------------------

Status Session::after_decode(int32_t rc, const char * which) {
    const HookError & error = hook_.error();
    Status            status;
    status.weight  = error.weight;
    status.mat     = error.mat;
    status.channel = error.channel;
    switch (error.kind) {
        case Failure::none:    break;
        case Failure::regroup: break; // step() redoes the chunk
        case Failure::non_finite:
            status.code    = Code::non_finite;
            status.message = "a NaN or infinite activation reached " + error.weight;
            return status;
        case Failure::bad_expert:
            status.code = Code::engine_failed;
            status.message =
                error.weight + ": expert id " + std::to_string(error.mat) + " is out of range";
            return status;
        case Failure::bad_layout:
            status.code    = Code::engine_failed;
            status.message = error.weight + ": activations in a layout that cannot be summed";
            return status;
        case Failure::shape_changed:
            status.code    = Code::engine_failed;
            status.message = error.weight + ": its shape differs from that of earlier chunks";
            return status;
        case Failure::device_failed:
            status.code    = Code::engine_failed;
            status.message = error.weight + ": the device that holds its activations failed";
            return status;
        case Failure::out_of_memory:
            return Status::failed(Code::out_of_memory, "out of memory for the sums");
    }
    if (cancelled_) {
        return Status::failed(Code::cancelled, "cancelled");
    }
    if (rc != 0) { // llama.h, llama_decode
        const std::string what = std::string("the engine could not decode the ") + which +
                                 " (status " + std::to_string(rc) + ")";
        return engine_error(rc == 1 || rc == -2 ? Code::out_of_memory : Code::engine_failed, what);
    }
    return {};
}

// Feeds positions [first, first + n_batch/n_seq) of every chunk to the trunk.
Status Session::decode_trunk(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                             int32_t first, std::vector<double> * nll) {
    const int32_t each = std::max(1, params_.n_batch / n_chunks);
    // without a memory all are outputs, and the engine complains of tokens that are not marked so
    const bool all = trunk_plan_.needs_outputs || llama_get_memory(trunk_.get()) == nullptr;
    std::vector<int32_t> scored_position; // where in `tokens`
    std::vector<int32_t> scored_index;    // where in the batch
    std::vector<int32_t> scored_chunk;

    llama_batch_ext_clear(trunk_batch_.get());
    const int32_t * chunk = tokens;
    for (int32_t i = 0; i < n_chunks; chunk += lengths[i++]) {
        for (llama_pos p = first; p < std::min(first + each, lengths[i]); ++p) {
            const int32_t index = llama_batch_ext_add_token(trunk_batch_.get(), i, chunk[p]);
            if (index < 0) {
                return Status::failed(Code::bad_argument, "token id " + std::to_string(chunk[p]) +
                                                              " is not in the vocabulary (" +
                                                              std::to_string(model_.n_vocab()) +
                                                              " tokens)");
            }
            llama_batch_ext_set_pos(trunk_batch_.get(), index, &p);
            // as llama-imatrix scores: the second half, without the last token
            const bool scored = nll != nullptr && p >= lengths[i] / 2 && p + 1 < lengths[i];
            llama_batch_ext_set_output_logits(trunk_batch_.get(), index, all || scored);
            if (scored) {
                scored_position.push_back(static_cast<int32_t>(chunk - tokens) + p);
                scored_index.push_back(index);
                scored_chunk.push_back(i);
            }
        }
    }
    hook_.begin_decode(params_.process_output);
    hook_.end_after(may_end_early() ? trunk_plan_.end : GraphEnd{});
    const int32_t rc = llama_process(trunk_.get(), LLAMA_PROCESS_TYPE_DECODE, trunk_batch_.get());
    hook_.end_after({});
    Status status = after_decode(rc, "trunk");
    if (!status.ok() || scored_index.empty()) {
        return status;
    }
    std::vector<double> values;
    score(tokens, scored_position, scored_index, values);
    for (size_t k = 0; k < values.size(); ++k) {
        nll[scored_chunk[k]].push_back(values[k]);
    }
    return status;
}

// -log softmax(logits)[next token] for some rows of the trunk's last batch.
void Session::score(const int32_t * tokens, const std::vector<int32_t> & positions,
                    const std::vector<int32_t> & batch_index, std::vector<double> & nll) {
    const int32_t              n_vocab = model_.n_vocab();
    std::vector<const float *> logits(batch_index.size());
    for (size_t k = 0; k < batch_index.size(); ++k) {
        logits[k] = llama_get_logits_ith(trunk_.get(), batch_index[k]);
    }
    nll.assign(logits.size(), 0.0);
    hook_.threads().run(logits.size(), [&](size_t k) {
        const float * row = logits[k];
        float         top = row[0];
        for (int32_t v = 1; v < n_vocab; ++v) {
            top = std::max(top, row[v]);
        }
        double sum = 0.0;
        for (int32_t v = 0; v < n_vocab; ++v) {
            sum += std::exp(row[v] - top);
        }
        nll[k] = std::log(sum) - static_cast<double>(row[tokens[positions[k] + 1]] - top);
    });
}

// Keeps the trunk's rows of the last decode as the states of the slots after them: slot p of
// the head gets token x_p and the trunk's row of slot p-1, zeros before the first token. This
// is what the engine's own driver does (common/speculative.cpp,
// common_speculative_impl_draft_mtp::process).
Status Session::keep_rows(int32_t first, int32_t n_tokens) {
    const float * h = llama_get_embeddings_nextn(trunk_.get());
    const size_t  n = static_cast<size_t>(n_embd_h_);
    if (h == nullptr || is_zero(h + static_cast<size_t>(n_tokens - 1) * n, n_embd_h_)) {
        return Status::failed(Code::engine_failed,
                              "the trunk of this architecture gives no rows for the head");
    }
    std::copy_n(h, static_cast<size_t>(n_tokens) * n,
                states_[0].begin() + static_cast<ptrdiff_t>((first + 1) * n));
    return {};
}

// Runs rows through the MTP context, in decodes of at most n_batch. With `out`, the hidden rows
// that come back are written to it: the row of slot p as the state of slot p+1.
//
// The state goes in by llama_batch_ext_set_embd_state, beside the token: the graph of a head
// asserts that there is one (llm_graph_input_embd_h::set_input, src/llama-graph.cpp).
Status Session::feed_head(const std::vector<HeadRow> & rows, bool observed,
                          std::vector<float> * out) {
    const size_t n     = static_cast<size_t>(n_embd_h_);
    const size_t batch = static_cast<size_t>(params_.n_batch);
    for (size_t first = 0; first < rows.size(); first += batch) {
        const size_t count = std::min(batch, rows.size() - first);
        llama_batch_ext_clear(head_batch_.get());
        for (size_t k = 0; k < count; ++k) {
            const HeadRow & row = rows[first + k];
            const int32_t index = llama_batch_ext_add_token(head_batch_.get(), row.seq, row.token);
            if (index < 0 || !llama_batch_ext_set_pos(head_batch_.get(), index, &row.pos) ||
                !llama_batch_ext_set_embd_state(head_batch_.get(), index, {row.state, 1, n})) {
                return Status::failed(Code::engine_failed, "the engine refused a row for the head");
            }
            llama_batch_ext_set_output_logits(head_batch_.get(), index, head_plan_.needs_outputs);
        }
        hook_.begin_decode(false, sharing_ ? kForeignHead : "", /*head=*/true);
        hook_.set_observing(observed);
        const int32_t rc = llama_process(head_.get(), LLAMA_PROCESS_TYPE_DECODE, head_batch_.get());
        hook_.set_observing(true);
        const Status status = after_decode(rc, "head");
        if (!status.ok()) {
            return status;
        }
        for (size_t k = 0; k < count && out != nullptr; ++k) {
            const float * h = llama_get_embeddings_nextn_ith(head_.get(), static_cast<int32_t>(k));
            if (h == nullptr) {
                return Status::failed(
                    Code::engine_failed,
                    "the head of this architecture gives no rows for the next one");
            }
            std::copy_n(h, n, out->begin() + (rows[first + k].pos + 1) * static_cast<ptrdiff_t>(n));
        }
    }
    return {};
}

// Runs every head layer over the chunk, whose trunk rows are in states_[0].
//
// Slot 0 goes first, by itself and unobserved: the driver fills the head's cache with it, and never
// drafts there (see FirstSlot).
Status Session::run_heads(const int32_t * tokens, int32_t n_tokens) {
    if (sharing_) {
        return run_sharing_head(tokens, n_tokens);
    }
    const size_t         n = static_cast<size_t>(n_embd_h_);
    std::vector<HeadRow> first;
    std::vector<HeadRow> rows;
    for (int32_t p = 0; p < n_tokens; ++p) {
        const bool alone = p == 0 && params_.first_slot != FirstSlot::counted;
        (alone ? first : rows)
            .push_back({tokens[p], p, 0, states_[0].data() + static_cast<size_t>(p) * n});
    }
    if (params_.first_slot == FirstSlot::absent) {
        first.clear();
    }
    Status status;
    for (int32_t head = 0; head < n_heads_ && status.ok(); ++head) {
        // the cache holds one set of positions for all head layers: each starts anew
        llama_memory_clear(llama_get_memory(head_.get()), true);
        llama_set_nextn_layer_offset(head_.get(), head);
        std::vector<float> * out = head == 0 && n_heads_ > 1 ? &states_[1] : nullptr;
        status                   = feed_head(first, false, out);
        if (status.ok()) {
            status = feed_head(rows, head == 0, out);
        }
        if (status.ok() && head > 0) {
            status = run_later_head(head, tokens, n_tokens);
        }
    }
    llama_set_nextn_layer_offset(head_.get(), 0);
    return status;
}

// Head d >= 1 as it runs when the engine drafts (common/speculative.cpp,
// common_speculative_impl_draft_mtp::draft, chain_heads): drafting starts d slots back, at slot
// p-d, with the trunk's row, and slot p-d+j gets the row that head j-1 gave for the slot before.
// Keys and values of slots up to p-d come from the trunk's rows, as process() leaves them: the
// caller has just decoded those, as sequence 0. Tokens are the text's own (teacher forcing). No
// draft starts at slot 0, so the first slot at which head d has a turn is d+1.
//
// Each slot p thus has its own view of the d slots before it, so each is a sequence of its own
// that shares the cells of sequence 0 up to p-d. Only the rows of slot p at depth d are
// observed; those in between, which fill keys and values for it, are not.
Status Session::run_later_head(int32_t head, const int32_t * tokens, int32_t n_tokens) {
    const llama_memory_t memory   = llama_get_memory(head_.get());
    const size_t         n        = static_cast<size_t>(n_embd_h_);
    const int32_t        together = std::min(kSlotsTogether, params_.n_batch);
    const int32_t        start    = params_.first_slot == FirstSlot::counted ? 0 : head + 1;
    std::vector<float> * out =
        head + 1 < n_heads_ ? &states_[static_cast<size_t>(head) + 1] : nullptr;
    std::vector<HeadRow> rows;
    for (int32_t first = start; first < n_tokens; first += together) {
        const int32_t end = std::min(first + together, n_tokens);
        for (int32_t p = first; p < end; ++p) {
            if (p - head + 1 > 0) {
                llama_memory_seq_cp(memory, 0, 1 + p - first, 0, p - head + 1);
            }
        }
        for (int32_t depth = 1; depth <= head; ++depth) {
            rows.clear();
            for (int32_t p = first; p < end; ++p) {
                const int32_t slot = p - head + depth;
                if (slot >= 0) {
                    rows.push_back({tokens[slot], slot, 1 + p - first,
                                    states_[static_cast<size_t>(depth)].data() +
                                        static_cast<size_t>(slot) * n});
                }
            }
            const bool   last   = depth == head;
            const Status status = feed_head(rows, last, last ? out : nullptr);
            if (!status.ok()) {
                return status;
            }
        }
        for (int32_t seq = 1; seq <= end - first; ++seq) {
            llama_memory_seq_rm(memory, seq, -1, -1);
        }
    }
    return {};
}

// A head without keys and values of its own, which reads those of the trunk. The engine drafts
// with it at the position of a token that the trunk has not seen yet (common/speculative.cpp,
// is_mem_shared: id_last at pos0, state of pos0-1), so slot p must see the trunk's cells up to
// p-1 and no more: a sequence of its own that shares those. Slot 0 has none to see, and the
// engine never drafts there: it is left out.
Status Session::run_sharing_head(const int32_t * tokens, int32_t n_tokens) {
    const llama_memory_t memory   = llama_get_memory(trunk_.get());
    const size_t         n        = static_cast<size_t>(n_embd_h_);
    const int32_t        together = std::min(kSlotsTogether, params_.n_batch);
    std::vector<HeadRow> rows;
    for (int32_t first = 1; first < n_tokens; first += together) {
        const int32_t end = std::min(first + together, n_tokens);
        rows.clear();
        for (int32_t p = first; p < end; ++p) {
            llama_memory_seq_cp(memory, 0, 1 + p - first, 0, p);
            rows.push_back(
                {tokens[p], p, 1 + p - first, states_[0].data() + static_cast<size_t>(p) * n});
        }
        const Status status = feed_head(rows, true, nullptr);
        for (int32_t seq = 1; seq <= end - first; ++seq) {
            llama_memory_seq_rm(memory, seq, -1, -1);
        }
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

// Slots at the start of a chunk at which no draft runs the weight: of block d of the head the first
// d+1, of the trunk none.
int64_t Session::slots_before(const std::string & weight) const {
    if (sharing_) {
        return 1; // see run_sharing_head
    }
    if (params_.first_slot == FirstSlot::counted) {
        return 0;
    }
    for (int32_t d = 1; d < n_heads_; ++d) {
        const std::string block = "blk." + std::to_string(head_model_->n_trunk() + d) + ".";
        if (weight.compare(0, block.size(), block) == 0) {
            return d + 1;
        }
    }
    return 1;
}

// Every weight that the graphs multiply must have seen every row of the chunk.
Status Session::check_rows(int64_t n_tokens) const {
    for (const GraphPlan * plan : {&trunk_plan_, &head_plan_}) {
        for (const PlannedWeight & planned : plan->weights) {
            const size_t  index  = sums_.find(planned.name);
            const int64_t seen   = index == Sums::npos ? 0 : sums_.weights()[index].pending_rows;
            const int64_t before = plan == &head_plan_ ? slots_before(planned.name) : 0;
            const int64_t slots  = std::max<int64_t>(0, n_tokens - before);
            const int64_t want   = planned.rows * slots;
            // a chunk may be too short for the last heads of a chain
            if (seen == want && (seen > 0 || slots == 0)) {
                continue;
            }
            if (planned.rows == 0 && seen > 0) {
                continue; // rows that do not follow the tokens, e.g. of a compressed sequence
            }
            Status status;
            status.code    = Code::rows_missing;
            status.weight  = planned.name;
            status.message = planned.name + " saw " + std::to_string(seen) +
                             " rows in a chunk of " + std::to_string(n_tokens) +
                             " tokens, expected " +
                             (planned.rows > 0 ? std::to_string(want) : std::string("some"));
            return status;
        }
    }
    return {};
}

// Every chunk in one graph, where its tokens see each other. Of chunks that differ in length a
// memory takes what all have into a first graph and the rest into others (llama-kv-cache.cpp,
// init_batch): they go one by one.
Status Session::decode_whole(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks) {
    std::vector<double> * nll = params_.perplexity ? nll_.data() : nullptr;
    if (std::all_of(lengths, lengths + n_chunks, [&](int32_t n) { return n == lengths[0]; })) {
        return decode_trunk(tokens, lengths, n_chunks, 0, nll);
    }
    Status status;
    for (int32_t i = 0; i < n_chunks && status.ok(); tokens += lengths[i++]) {
        llama_memory_clear(llama_get_memory(trunk_.get()), true);
        status = decode_trunk(tokens, lengths + i, 1, 0, nll == nullptr ? nullptr : nll + i);
    }
    return status;
}

Status Session::try_decode() {
    if (trunk_ == nullptr || params_.computes) {
        return Status::failed(Code::bad_argument, "the session is open to compute, or not at all");
    }
    clear_error();
    // only where tokens see those after them does it matter how many there are
    const int32_t n_tokens = causal_ ? std::min(params_.n_ctx, kProbeTokens) : params_.n_ctx;
    const std::vector<int32_t> tokens(static_cast<size_t>(n_tokens), 0);
    states_.assign(
        1, std::vector<float>(static_cast<size_t>(n_tokens + 1) * static_cast<size_t>(n_embd_h_)));
    const auto tried = [](const std::function<Status()> & decode) {
        try {
            return decode();
        } catch (const NothingComputed &) {
            return Status{};
        } catch (const std::bad_alloc &) {
            return Status::failed(Code::out_of_memory, "out of memory in a decode");
        } catch (const std::exception & error) {
            return Status::failed(Code::engine_failed, error.what());
        }
    };
    Status status = tried([&] { return decode_trunk(tokens.data(), &n_tokens, 1, 0, nullptr); });
    if (head_ != nullptr && sharing_ && status.ok()) {
        return tried([&] { return run_sharing_head(tokens.data(), n_tokens); });
    }
    for (int32_t head = 0; head < n_heads_ && status.ok(); ++head) {
        std::vector<HeadRow> rows;
        for (int32_t p = 0; p < n_tokens; ++p) {
            rows.push_back({0, p, 0, states_[0].data()});
        }
        llama_memory_clear(llama_get_memory(head_.get()), true);
        llama_set_nextn_layer_offset(head_.get(), head);
        status = tried([&] { return feed_head(rows, true, nullptr); });
    }
    return status;
}

Status Session::collect(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                        ChunkScore * scores) {
    // however it ends: rows may still be on their way to sums that will be dropped
    struct Settled {
        EvalHook & hook;
        ~Settled() { hook.settle(); }
    } const settled{hook_};
    hook_.begin_chunk();
    clear_error();
    llama_memory_clear(llama_get_memory(trunk_.get()), true);
    states_.resize(static_cast<size_t>(n_heads_));
    for (std::vector<float> & states : states_) {
        states.assign(static_cast<size_t>(params_.n_ctx + 1) * static_cast<size_t>(n_embd_h_),
                      0.0f);
    }
    nll_.assign(static_cast<size_t>(n_chunks), {});

    const int32_t longest = *std::max_element(lengths, lengths + n_chunks);
    const int32_t each    = std::max(1, params_.n_batch / n_chunks);
    int64_t       total   = 0;
    for (int32_t i = 0; i < n_chunks; ++i) {
        total += lengths[i];
    }
    if (!causal_) {
        const Status status = decode_whole(tokens, lengths, n_chunks);
        if (!status.ok()) {
            return status;
        }
    }
    for (int32_t first = 0; causal_ && first < longest; first += each) {
        Status status = decode_trunk(tokens, lengths, n_chunks, first,
                                     params_.perplexity ? nll_.data() : nullptr);
        if (status.ok() && head_ != nullptr) {
            status = keep_rows(first, std::min(each, longest - first));
        }
        if (!status.ok()) {
            return status;
        }
    }
    if (head_ != nullptr) {
        const Status status = run_heads(tokens, longest);
        if (!status.ok()) {
            return status;
        }
    }
    // the last graph may still be running where nothing stopped it
    llama_synchronize(trunk_.get());
    hook_.finish_chunk();
    const Status summed = after_decode(0, "trunk");
    if (!summed.ok()) {
        return summed;
    }
    for (int32_t i = 0; i < n_chunks && scores != nullptr; ++i) {
        scores[i] = {};
        for (const double v : nll_[static_cast<size_t>(i)]) {
            scores[i].nll += v;
            scores[i].nll_sq += v * v;
            ++scores[i].n_scored;
        }
    }
    if (hook_.error().kind == Failure::regroup) {
        return {};
    }
    return hook_.enabled() ? check_rows(total) : Status{};
}

Status Session::restore(const std::vector<std::string> & names, const Shape & shape,
                        const double * sums, const int64_t * counts, const double * signed_sums) {
    try {
        if (!sums_.restore(names, shape, sums, counts, signed_sums)) {
            return Status::failed(Code::bad_argument, "a weight to restore has sums already");
        }
    } catch (const std::bad_alloc &) {
        return Status::failed(Code::out_of_memory, "out of memory for the sums to restore");
    }
    return {};
}

Status Session::step(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                     ChunkScore * scores) {
    if (trunk_ == nullptr) {
        return Status::failed(Code::bad_argument, "the session is not open");
    }
    if (n_chunks < 1 || n_chunks > params_.n_seq) {
        return Status::failed(Code::bad_argument, "1 to n_seq chunks a step");
    }
    for (int32_t i = 0; i < n_chunks; ++i) {
        if (lengths[i] < 1 || lengths[i] > params_.n_ctx) {
            return Status::failed(Code::bad_argument, "1 to n_ctx tokens a chunk");
        }
    }
    Status status;
    try {
        status = collect(tokens, lengths, n_chunks, scores);
        if (status.code == Code::rows_missing && params_.leave_out_logits && may_end_early()) {
            // not the nodes that the plan has: run whole graphs from here on
            params_.leave_out_logits = false;
            sums_.discard();
            status = collect(tokens, lengths, n_chunks, scores);
        }
        const bool diverged = hook_.error().kind == Failure::regroup || !hook_.groups_agree();
        if (status.ok() && diverged) {
            // Weights that shared an activation in an earlier graph do not share it any more:
            // from here on each is fetched and summed on its own.
            sums_.ungroup();
            hook_.stop_grouping();
            status = collect(tokens, lengths, n_chunks, scores);
        }
    } catch (const std::bad_alloc &) {
        status = Status::failed(Code::out_of_memory, "out of memory in a chunk");
    } catch (const std::exception & error) {
        status = engine_error(Code::engine_failed, error.what());
    }
    if (status.ok()) {
        sums_.commit();
    } else {
        sums_.discard();
    }
    return status;
}

} // namespace imatrix
