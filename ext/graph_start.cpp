#include "graph_start.h"

#include "wanted_nodes.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <exception>
#include <new>
#include <unordered_map>

namespace imatrix {
namespace {

// What the engine calls the rows that a block gives to the next one, with the number of one of the
// two: nearly all its models, those with several streams (src/models/deepseek4.cpp, qwen4exp.cpp),
// nemotron-h.cpp, and step35.cpp, where the next block names them again.
struct RowsName {
    const char * name;
    bool         of_next;
};
constexpr RowsName kBlockRows[] = {
    {"l_out", false}, {"l_last", false}, {"nemotron_h_block_out", false}, {"attn_norm_in", true}};

// A node that is only another way to look at a tensor.
bool is_view(int op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE || op == GGML_OP_NONE;
}

const ggml_tensor * root_of(const ggml_tensor * tensor) {
    while (tensor->view_src != nullptr) {
        tensor = tensor->view_src;
    }
    return tensor;
}

} // namespace

void GraphStarter::begin(const GraphStart * from, GraphStart * kept, int32_t block) {
    from_   = from;
    kept_   = kept;
    other_  = false;
    failed_ = false;
    nodes_.clear();
    keep_.clear();
    if (kept_ != nullptr) {
        *kept_ = {};
        for (const RowsName & rows : kBlockRows) {
            const int32_t number = rows.of_next ? block : block - 1;
            keep_.push_back(std::string(rows.name) + "-" + std::to_string(number));
        }
    }
}

bool GraphStarter::callback(ggml_tensor * node, bool ask, void * user_data) noexcept {
    auto & starter = *static_cast<GraphStarter *>(user_data);
    try {
        if (ask) {
            return starter.ask(node);
        }
        starter.computed(node);
    } catch (const std::exception &) {
        starter.failed_ = true;
    }
    return !ask;
}

bool GraphStarter::ask(ggml_tensor * node) {
    if (from_ == nullptr && kept_ == nullptr) {
        return false;
    }
    const auto number = static_cast<int64_t>(nodes_.size());
    nodes_.push_back({node, static_cast<int>(node->op)});
    bool stop = std::find(keep_.begin(), keep_.end(), node->name) != keep_.end();
    if (from_ != nullptr && number <= from_->cut) {
        if (number == from_->cut) {
            other_ |= from_->cut_name != node->name || ggml_nbytes(node) != from_->rows.size();
            stop = true;
        }
        if (from_->left_out[static_cast<size_t>(number)] != 0) {
            node->op = GGML_OP_NONE;
        }
    }
    return stop;
}

void GraphStarter::computed(ggml_tensor * node) {
    const auto number = static_cast<int64_t>(nodes_.size()) - 1;
    if (from_ != nullptr && number == from_->cut) {
        if (!other_) {
            ggml_backend_tensor_set(node, from_->rows.data(), 0, from_->rows.size());
        }
        return;
    }
    kept_->rows.resize(ggml_nbytes(node));
    ggml_backend_tensor_get(node, kept_->rows.data(), 0, kept_->rows.size());
    kept_->cut      = number; // the last one of the name
    kept_->cut_name = node->name;
}

bool GraphStarter::end() {
    for (const Node & node : nodes_) {
        node.tensor->op = static_cast<ggml_op>(node.op);
    }
    if (failed_) {
        throw std::bad_alloc();
    }
    const auto n_nodes = static_cast<int64_t>(nodes_.size());
    const bool same    = from_ == nullptr || (!other_ && n_nodes == from_->n_nodes);
    if (kept_ != nullptr) {
        kept_->n_nodes = n_nodes;
        if (same && kept_->cut >= 0) {
            find_left_out();
        }
    }
    nodes_.clear();
    return same;
}

// What the nodes behind the cut need is found backwards. A node needs what it reads; and of a
// tensor that it reads, or a view of one, all that was written there before: keys, values and
// states, which are written by nodes that nothing has for a source.
void GraphStarter::find_left_out() {
    const int64_t                                         cut = kept_->cut;
    std::unordered_map<const ggml_tensor *, int64_t>      number_of;
    std::unordered_multimap<std::string, int64_t>         named;
    std::unordered_multimap<const ggml_tensor *, int64_t> writers;
    const ggml_tensor * const                             rows = nodes_[cut].tensor;
    for (int64_t i = 0; i < static_cast<int64_t>(nodes_.size()); ++i) {
        const ggml_tensor * node = nodes_[static_cast<size_t>(i)].tensor;
        number_of[node]          = i;
        if (i < cut) {
            named.emplace(node->name, i);
            if (node->view_src != nullptr && !is_view(nodes_[static_cast<size_t>(i)].op)) {
                writers.emplace(root_of(node), i);
            }
        }
    }
    std::vector<uint8_t> needed(static_cast<size_t>(cut) + 1, 0);
    std::vector<int64_t> open;
    const auto           need = [&](int64_t i) {
        if (i < cut && needed[static_cast<size_t>(i)] == 0) {
            needed[static_cast<size_t>(i)] = 1;
            open.push_back(i);
        }
    };
    const auto visit = [&](const ggml_tensor * node, int64_t number) {
        for (int k = 0; k < GGML_MAX_SRC; ++k) {
            const ggml_tensor * source = node->src[k];
            if (source == nullptr || source == rows) {
                continue;
            }
            const auto found = number_of.find(source);
            if (found != number_of.end()) {
                need(found->second);
            } else {
                // the scheduler's copy for another device is no node, but has the name of one
                const std::string plain = plain_name(source->name);
                if (plain != kept_->cut_name) {
                    const auto same = named.equal_range(plain);
                    for (auto each = same.first; each != same.second; ++each) {
                        need(each->second);
                    }
                }
            }
            if (root_of(source) != root_of(rows)) {
                const auto before = writers.equal_range(root_of(source));
                for (auto each = before.first; each != before.second; ++each) {
                    if (each->second < number) {
                        need(each->second);
                    }
                }
            }
        }
    };
    for (int64_t i = cut + 1; i < static_cast<int64_t>(nodes_.size()); ++i) {
        visit(nodes_[static_cast<size_t>(i)].tensor, i);
    }
    while (!open.empty()) {
        const int64_t i = open.back();
        open.pop_back();
        visit(nodes_[static_cast<size_t>(i)].tensor, i);
    }
    kept_->left_out.assign(static_cast<size_t>(cut) + 1, 0);
    for (int64_t i = 0; i <= cut; ++i) {
        kept_->left_out[static_cast<size_t>(i)] = needed[static_cast<size_t>(i)] == 0 ? 1 : 0;
    }
}

} // namespace imatrix
