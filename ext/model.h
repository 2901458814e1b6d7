// A model that the engine has loaded: its weights, its tokenizer, and what it is. model_header.h
// reads a file's header and loads nothing.
#pragma once

#include "placement.h"
#include "status.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

namespace imatrix {

// This goes before the weights' names of a head that is a model of its own kind
// (gemma4-assistant), because its blocks are numbered from 0 like the trunk's.
inline constexpr const char * kForeignHead = "mtp:";

struct ModelParams {
    std::string path;
    bool        mtp           = false; // load the head's tensors too
    int32_t     n_gpu_layers  = -1;    // all
    bool        use_mmap      = true;
    bool        check_tensors = false;
    bool        no_alloc      = false; // shapes only: graphs can be built, nothing can run
    bool        changeable    = false; // its weights can be changed (weights.h): read, not mapped
    Placement   placement;             // of what is put on devices
};

// It must outlive the contexts that are made from it.
class Model {
public:
    Status load(const ModelParams & params);

    llama_model * get() const { return model_.get(); }
    std::string   description() const;
    bool          has_decoder() const;
    bool          has_encoder() const;
    int32_t       n_ctx_train() const;

    // Whether a token sees only those before it; a context of the engine is made to ask it.
    Status causal(bool & out) const;

    // Keys that begin with `prefix` and their values as text, without arrays.
    std::vector<std::pair<std::string, std::string>> metadata(const std::string & prefix) const;

    // --- trunk and head
    int32_t     n_trunk() const;       // blocks of the trunk
    int32_t     n_nextn() const;       // blocks of the head
    int32_t     n_heads() const;       // graphs of the head: a draft runs one after the other
    bool        shares_memory() const; // the head reads its trunk's keys and values
    bool        copies_whole_sequences() const; // llama_memory_seq_cp takes no part of one
    std::string head_prefix() const;            // kForeignHead for a head of its own kind, or ""
    // What the names of head `head`'s weights start with, with head_prefix().
    std::string head_block(int32_t head) const;

    // --- vocabulary
    int32_t     n_vocab() const;
    bool        has_tokenizer() const;
    bool        add_bos() const;
    int32_t     bos() const;
    std::string token_text(int32_t token) const; // "" if there is no such token
    Status      tokenize(const std::string & text, bool add_special, bool parse_special,
                         std::vector<int32_t> & out) const;

private:
    struct Free {
        void operator()(llama_model * model) const;
    };
    bool   is_architecture(const char * name) const;
    Status tokenize_here(const std::string & text, bool add_special, bool parse_special,
                         std::vector<int32_t> & out) const;

    std::unique_ptr<llama_model, Free> model_;
};

} // namespace imatrix
