#include "model.h"

#include "backend_modules.h"
#include "engine_context.h"
#include "engine_log.h"
#include "live.h"

#include "llama.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <new>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace imatrix {
namespace {

Status init_backend_once() {
    Status status = load_backends();
    if (status.ok()) {
        static std::once_flag once;
        std::call_once(once, [] { llama_backend_init(); });
    }
    return status;
}

// std::regex, which most pre-tokenizers run on (src/unicode.cpp, unicode_regex_split_stl), calls
// itself for every character of a match: 320 bytes of stack a character in libstdc++, so that 25000
// letters without a space end the process on a usual stack of 8 MiB.
constexpr size_t kStackPerByte   = 512;
constexpr size_t kCalmStretch    = 4096;    // needs no stack but the caller's
constexpr size_t kLongestStretch = 8 << 20; // 4 GiB of stack, of which only what is used is taken

// Bytes of the longest piece of a text that is all spaces, or has none.
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
// Runs `work` in a thread with that much stack; false if it cannot be had.
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

} // namespace

void Model::Free::operator()(llama_model * model) const {
    llama_model_free(model);
    --g_live_models;
}

Status Model::load(const ModelParams & params) {
    Status status = init_backend_once();
    if (!status.ok()) {
        return status;
    }
    clear_error();
    llama_model_params engine = llama_model_default_params();
    engine.n_gpu_layers       = params.n_gpu_layers;
    engine.load_mode          = params.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
    engine.check_tensors      = params.check_tensors;
    if (params.changeable) {
        engine.load_mode       = LLAMA_LOAD_MODE_NONE;
        engine.use_extra_bufts = false; // they keep weights in an order of their own
    }
    if (params.no_alloc) {
        engine.no_alloc  = true;
        engine.load_mode = LLAMA_LOAD_MODE_NONE;
    }
    // without it the head's tensors are skipped as unused (src/models/*.cpp, mtp_flags)
    engine.load_mtp = params.mtp;
    EnginePlacement placement;
    status = placement.set(params.placement, params.path, engine);
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
    EngineContextParams params;
    params.n_ctx = params.n_batch = params.n_ubatch = 1;
    ContextPtr   ctx;
    const Status status = make_engine_context(get(), params, ctx);
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

int32_t Model::n_heads() const {
    return shares_memory() ? 1 : n_nextn(); // a foreign head has all its blocks in one graph
}

std::string Model::head_prefix() const { return shares_memory() ? kForeignHead : ""; }

std::string Model::head_block(int32_t head) const {
    const int32_t block = shares_memory() ? 0 : n_trunk() + head;
    return head_prefix() + "blk." + std::to_string(block) + ".";
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
    // std::out_of_range: the vocabulary lacks a byte or a token that the text needs
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

} // namespace imatrix
