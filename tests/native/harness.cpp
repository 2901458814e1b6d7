#include "harness.h"

#include "backend_modules.h"
#include "far_device.h"

#include "ggml.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace imatrix::testing {
namespace {

constexpr size_t kContextBytes = 1 << 20;
constexpr size_t kMaxNodes     = 512;

struct FreeContext {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }
};
struct FreeBuffer {
    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }
};
using ContextPtr = std::unique_ptr<ggml_context, FreeContext>;
using BufferPtr  = std::unique_ptr<ggml_backend_buffer, FreeBuffer>;

ContextPtr make_context(std::vector<std::max_align_t> & memory) {
    memory.resize(kContextBytes / sizeof(std::max_align_t));
    return ContextPtr(ggml_init({kContextBytes, memory.data(), /*.no_alloc =*/true}));
}

} // namespace

struct Harness::Graph {
    ContextPtr                 weights;
    ContextPtr                 inputs;
    ContextPtr                 nodes;
    ContextPtr                 copies;
    BufferPtr                  copies_buffer;
    BufferPtr                  weights_buffer;
    BufferPtr                  inputs_buffer;
    std::vector<ggml_tensor *> products;
    std::vector<ggml_tensor *> copied;
    ggml_cgraph *              graph = nullptr;
};

Harness::Harness(Where where, const std::string & device) : where_(where) {
    const Status loaded = load_backends();
    if (!loaded.ok()) {
        throw std::runtime_error(loaded.message);
    }
    if (where != Where::host) {
        const ggml_backend_dev_t dev =
            device.empty() ? far_device() : ggml_backend_dev_by_name(device.c_str());
        if (dev == nullptr) {
            throw std::runtime_error("the engine has no device " + device);
        }
        backends_.push_back(ggml_backend_dev_init(dev, nullptr));
    }
    backends_.push_back(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    scheduler_ = ggml_backend_sched_new(backends_.data(), nullptr,
                                        static_cast<int>(backends_.size()), kMaxNodes,
                                        /*parallel=*/false, /*op_offload=*/false);
    ggml_backend_sched_set_eval_callback(scheduler_, EvalHook::callback, &hook);
}

Harness::~Harness() {
    ggml_backend_sched_free(scheduler_);
    std::for_each(backends_.begin(), backends_.end(), ggml_backend_free);
}

std::unique_ptr<Harness::Graph> Harness::build(const std::vector<Rows> &    rows,
                                               const std::vector<Ids> &     ids,
                                               const std::vector<Product> & products) {
    auto made     = std::make_unique<Graph>();
    made->weights = make_context(memory_[0]);
    made->inputs  = make_context(memory_[1]);
    made->nodes   = make_context(memory_[2]);
    made->copies  = make_context(memory_[3]);

    // Flat storage first: a view knows its address only when its source has one. ggml also
    // wants room for as many elements as the view has, wherever its strides point.
    std::vector<ggml_tensor *> row_storage;
    std::vector<ggml_tensor *> id_storage;
    for (const Rows & r : rows) {
        const int64_t room = r.offset + r.ne[0] * r.ne[1] * r.ne[2] * r.ne[3];
        const int64_t size = std::max<int64_t>({static_cast<int64_t>(r.size), room, 1});
        row_storage.push_back(ggml_new_tensor_1d(made->inputs.get(), GGML_TYPE_F32, size));
    }
    for (const Ids & i : ids) {
        const int64_t room = i.offset + i.n_used * i.n_rows;
        const int64_t size = std::max<int64_t>({static_cast<int64_t>(i.size), room, 1});
        id_storage.push_back(ggml_new_tensor_1d(made->inputs.get(), GGML_TYPE_I32, size));
    }
    std::map<std::pair<std::string, std::array<int64_t, 4>>, ggml_tensor *> weights;
    for (const Product & p : products) {
        const std::array<int64_t, 4> ne{rows.at(p.rows).ne[0], p.n_out, p.ne2, p.ne3};
        if (p.n_out == 0) {
            const std::array<int64_t, 4> & of = rows.at(p.rows).ne;
            made->copied.push_back(
                ggml_new_tensor_4d(made->copies.get(), GGML_TYPE_F32, of[0], of[1], of[2], of[3]));
            continue;
        }
        ggml_tensor *& weight = weights[{p.weight, ne}];
        if (weight == nullptr) {
            weight =
                ggml_new_tensor_4d(made->weights.get(), GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3]);
            ggml_set_name(weight, p.weight.c_str());
        }
    }

    const auto cpu = ggml_backend_get_default_buffer_type(backends_.back());
    const auto far = ggml_backend_get_default_buffer_type(backends_.front());
    made->weights_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(
        made->weights.get(), where_ == Where::offload ? cpu : far));
    made->inputs_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(made->inputs.get(), far));
    if (!made->copied.empty()) {
        made->copies_buffer.reset(
            ggml_backend_alloc_ctx_tensors_from_buft(made->copies.get(), far));
        if (made->copies_buffer == nullptr) {
            throw std::runtime_error("ggml allocated nothing");
        }
        ggml_backend_buffer_clear(made->copies_buffer.get(), 0);
    }
    if (made->weights_buffer == nullptr || made->inputs_buffer == nullptr) {
        throw std::runtime_error("ggml allocated nothing");
    }
    ggml_backend_buffer_set_usage(made->weights_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(made->weights_buffer.get(), 0);
    ggml_backend_buffer_clear(made->inputs_buffer.get(), 0);

    std::vector<ggml_tensor *> row_views;
    std::vector<ggml_tensor *> id_views;
    const auto                 bytes = [](int64_t n) {
        return static_cast<size_t>(n) * 4;
    };
    for (size_t k = 0; k < rows.size(); ++k) {
        const Rows & r = rows[k];
        ggml_backend_tensor_set(row_storage[k], r.data, 0, r.size * sizeof(float));
        ggml_tensor * view = ggml_view_4d(made->nodes.get(), row_storage[k], r.ne[0], r.ne[1],
                                          r.ne[2], r.ne[3], bytes(r.stride[1]), bytes(r.stride[2]),
                                          bytes(r.stride[3]), bytes(r.offset));
        view->nb[0]        = bytes(r.stride[0]); // other than one float only ever with replay
        row_views.push_back(view);
    }
    for (size_t k = 0; k < ids.size(); ++k) {
        const Ids & i = ids[k];
        ggml_backend_tensor_set(id_storage[k], i.data, 0, i.size * sizeof(int32_t));
        id_views.push_back(ggml_view_2d(made->nodes.get(), id_storage[k], i.n_used, i.n_rows,
                                        bytes(i.stride), bytes(i.offset)));
    }
    made->graph     = ggml_new_graph_custom(made->nodes.get(), kMaxNodes, /*grads=*/false);
    size_t n_copied = 0;
    for (const Product & p : products) {
        if (p.n_out == 0) {
            ggml_tensor * node =
                ggml_cpy(made->nodes.get(), row_views[p.rows], made->copied[n_copied++]);
            ggml_build_forward_expand(made->graph, node);
            made->products.push_back(node);
            continue;
        }
        const std::array<int64_t, 4> ne{rows.at(p.rows).ne[0], p.n_out, p.ne2, p.ne3};
        ggml_tensor *                weight = weights.at({p.weight, ne});
        ggml_tensor *                x      = row_views[p.rows];
        ggml_tensor * node = p.ids < 0 ? ggml_mul_mat(made->nodes.get(), weight, x)
                                       : ggml_mul_mat_id(made->nodes.get(), weight, x,
                                                         id_views.at(static_cast<size_t>(p.ids)));
        ggml_build_forward_expand(made->graph, node);
        made->products.push_back(node);
    }
    return made;
}

std::string Harness::run(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                         const std::vector<Product> & products, bool replay) {
    const std::unique_ptr<Graph> made = build(rows, ids, products);
    if (replay) {
        for (int i = 0; i < ggml_graph_n_nodes(made->graph); ++i) {
            ggml_tensor * node = ggml_graph_node(made->graph, i);
            if (EvalHook::callback(node, true, &hook) && !EvalHook::callback(node, false, &hook)) {
                break;
            }
        }
        return {};
    }
    ggml_backend_sched_reset(scheduler_);
    if (where_ != Where::host) {
        for (ggml_tensor * node : made->products) {
            ggml_backend_sched_set_tensor_backend(scheduler_, node, backends_.front());
        }
    }
    // allocated apart: graph_compute alone would forget the assignments (ggml-backend.cpp)
    if (!ggml_backend_sched_alloc_graph(scheduler_, made->graph)) {
        return "ggml allocated nothing";
    }
    const ggml_status status = ggml_backend_sched_graph_compute(scheduler_, made->graph);
    copied.clear();
    for (const ggml_tensor * tensor : made->copied) {
        copied.emplace_back(static_cast<size_t>(ggml_nelements(tensor)));
        ggml_backend_tensor_get(tensor, copied.back().data(), 0, ggml_nbytes(tensor));
    }
    ggml_backend_sched_reset(scheduler_);
    return status == GGML_STATUS_SUCCESS ? "" : ggml_status_to_string(status);
}

std::vector<PlannedWeight> Harness::plan(const std::vector<Rows> &    rows,
                                         const std::vector<Ids> &     ids,
                                         const std::vector<Product> & products,
                                         bool                         output_weight) {
    return planned_weights(build(rows, ids, products)->graph, {output_weight, /*head=*/false}, {});
}

GraphEnd Harness::end(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                      const std::vector<Product> & products) {
    return end_of(build(rows, ids, products)->graph, {});
}

} // namespace imatrix::testing
