#include "device_sums.h"

#include "engine_log.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <exception>
#include <map>
#include <string>
#include <utility>

namespace imatrix {
namespace {

constexpr size_t kMaxTensors = 512;

// Rows of an expert that are added in one go. Expert lists are filled up to a multiple of it
// with rows of zeros: few enough to waste little, enough that a few rounds do.
constexpr size_t kTogether = 16;

// Gathered rows of all experts take at most this many bytes of device memory at a time.
constexpr size_t kGatherBytes = size_t{64} << 20;

// CUDA's PAD starts a block a row in a dimension that ends here (ggml-cuda/pad.cu).
constexpr int64_t kMaxPadded = 65535;

struct FreeContext {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }
};
struct FreeBuffer {
    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }
};
struct FreeBackend {
    void operator()(ggml_backend * backend) const { ggml_backend_free(backend); }
};
struct FreeAllocator {
    void operator()(ggml_gallocr * allocator) const { ggml_gallocr_free(allocator); }
};
using ContextPtr   = std::unique_ptr<ggml_context, FreeContext>;
using BufferPtr    = std::unique_ptr<ggml_backend_buffer, FreeBuffer>;
using BackendPtr   = std::unique_ptr<ggml_backend, FreeBackend>;
using AllocatorPtr = std::unique_ptr<ggml_gallocr, FreeAllocator>;

ggml_backend_buffer_t buffer_of(const ggml_tensor * tensor) {
    return tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer;
}

// float32 sums that stay on a device for the length of a chunk, [n_in or 2 * n_in, n_mat]
struct Held {
    ContextPtr    context;
    BufferPtr     buffer;
    ggml_tensor * tensor   = nullptr;
    size_t        weight   = 0;
    bool          has_data = false; // of this chunk
};

} // namespace

struct DeviceSums::Device {
    ggml_backend_dev_t     device = nullptr;
    BackendPtr             backend; // our own; NULL if there can be none
    AllocatorPtr           allocator;
    std::map<size_t, Held> held;           // by slot
    bool                   told   = false; // that it cannot
    bool                   failed = false;

    void tell(const std::string & why) {
        if (!told) {
            told = true;
            log_line(GGML_LOG_LEVEL_INFO, std::string("imatrix: ") + ggml_backend_dev_name(device) +
                                              ": activations are copied to the host, " + why);
        }
    }
};

// One small graph, made in memory that all of them share.
struct DeviceSums::Graph {
    using Numbers = std::pair<ggml_tensor *, std::vector<int32_t>>;
    ContextPtr           context;
    ggml_cgraph *        graph;
    std::vector<Numbers> tables; // written before it runs

    explicit Graph(std::vector<char> & memory) {
        memory.resize(ggml_tensor_overhead() * kMaxTensors +
                      ggml_graph_overhead_custom(kMaxTensors, /*grads=*/false));
        context.reset(ggml_init({memory.size(), memory.data(), /*.no_alloc =*/true}));
        graph = ggml_new_graph_custom(context.get(), kMaxTensors, /*grads=*/false);
    }

    // A tensor of ours over bytes that the engine's own scheduler has on this device.
    ggml_tensor * view(const ggml_tensor * theirs) {
        ggml_tensor * mine =
            ggml_new_tensor(context.get(), theirs->type, GGML_MAX_DIMS, theirs->ne);
        std::copy_n(theirs->nb, GGML_MAX_DIMS, mine->nb);
        mine->buffer = buffer_of(theirs);
        mine->data   = theirs->data;
        return mine;
    }

    // What is to be added up, contiguous: squares and, with `both`, the rows themselves behind
    // them, so that one pass adds the two. CUDA's SQR wants contiguous rows and does not say so
    // when it is asked what it supports (ggml-cuda/unary.cu).
    ggml_tensor * addends(const ggml_tensor * theirs, bool both) {
        ggml_tensor * rows = view(theirs);
        if (!ggml_is_contiguous(rows)) {
            rows = ggml_cont(context.get(), rows);
        }
        ggml_tensor * squares = ggml_sqr(context.get(), rows);
        return both ? ggml_concat(context.get(), squares, rows, 0) : squares;
    }

    // [n_in, n, m] -> [n_in, m]: the sum over dimension 1, by halves
    ggml_tensor * add_up(ggml_tensor * x) {
        const int64_t n_in = x->ne[0];
        const int64_t m    = x->ne[2];
        const auto    part = [&](ggml_tensor * of, int64_t first, int64_t count) {
            return ggml_view_3d(context.get(), of, n_in, count, m, of->nb[1], of->nb[2],
                                static_cast<size_t>(first) * of->nb[1]);
        };
        ggml_tensor * odd = nullptr; // the rows that were left over
        while (x->ne[1] > 1) {
            const int64_t half = x->ne[1] / 2;
            if (x->ne[1] % 2 == 1) {
                ggml_tensor * last = part(x, 2 * half, 1);
                odd                = odd == nullptr ? last : ggml_add(context.get(), last, odd);
            }
            x = ggml_add(context.get(), part(x, 0, half), part(x, half, half));
        }
        if (odd != nullptr) {
            x = ggml_add(context.get(), x, odd);
        }
        return ggml_reshape_2d(context.get(), x, n_in, m);
    }

    // Rows of `table` by number, `each` of them added to one new row
    ggml_tensor * gather(ggml_tensor * table, std::vector<int32_t> numbers, int64_t each) {
        const int64_t n = static_cast<int64_t>(numbers.size());
        ggml_tensor * t = ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, n);
        ggml_set_input(t); // or its memory is used again before it is read (ggml-alloc.c)
        tables.emplace_back(t, std::move(numbers));
        ggml_tensor * rows = ggml_get_rows(context.get(), table, t);
        return add_up(ggml_reshape_3d(context.get(), rows, table->ne[0], each, n / each));
    }
};

DeviceSums::DeviceSums()  = default;
DeviceSums::~DeviceSums() = default;

bool DeviceSums::is_far(const ggml_tensor * tensor) {
    const ggml_backend_buffer_t buffer = buffer_of(tensor);
    return buffer != nullptr && !ggml_backend_buffer_is_host(buffer);
}

DeviceSums::Device * DeviceSums::device_of(const ggml_tensor * tensor) {
    const ggml_backend_dev_t device =
        ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer_of(tensor)));
    if (device == nullptr) {
        return nullptr;
    }
    for (const std::unique_ptr<Device> & known : devices_) {
        if (known->device == device) {
            return known->backend != nullptr && !known->failed ? known.get() : nullptr;
        }
    }
    auto made    = std::make_unique<Device>();
    made->device = device;
    // A tensor of the meta device lies in pieces on several others (ggml-backend-meta.cpp).
    if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_META) {
        made->backend.reset(ggml_backend_dev_init(device, nullptr));
    }
    if (made->backend == nullptr) {
        made->tell("it makes no backend of our own");
    } else {
        made->allocator.reset(
            ggml_gallocr_new(ggml_backend_get_default_buffer_type(made->backend.get())));
    }
    devices_.push_back(std::move(made));
    return devices_.back()->backend != nullptr ? devices_.back().get() : nullptr;
}

void DeviceSums::begin_chunk() {
    for (const std::unique_ptr<Device> & device : devices_) {
        for (auto & [slot, held] : device->held) {
            held.has_data = false;
        }
    }
}

// Adds `sums` [n_in or 2 * n_in, n_mat] to what the device holds for the slot.
DeviceSums::Outcome DeviceSums::run(Device & device, Graph & graph, ggml_tensor * sums,
                                    size_t weight, size_t slot, const Shape & shape) {
    ggml_backend * backend = device.backend.get();
    Held &         held    = device.held[slot];
    if (held.tensor == nullptr || held.tensor->ne[0] != sums->ne[0]) {
        ContextPtr    context(ggml_init({ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true}));
        ggml_tensor * tensor =
            ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, sums->ne[0], shape.n_mat);
        BufferPtr buffer(ggml_backend_alloc_ctx_tensors(context.get(), backend));
        if (buffer == nullptr) {
            device.tell("it has no memory left for sums");
            return Outcome::unsupported;
        }
        held = {std::move(context), std::move(buffer), tensor, weight, false};
    }
    sums = held.has_data ? ggml_add_inplace(graph.context.get(), held.tensor, sums)
                         : ggml_cpy(graph.context.get(), sums, held.tensor);
    ggml_build_forward_expand(graph.graph, sums);
    for (int i = 0; i < ggml_graph_n_nodes(graph.graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph.graph, i);
        if (!ggml_backend_supports_op(backend, node)) {
            device.tell(std::string("it does not support ") + ggml_op_desc(node));
            return Outcome::unsupported;
        }
    }
    // Reserved anew each time: alloc_graph alone keeps the plan of an earlier graph that has as
    // many nodes of sizes that fit, even if others read them (ggml-alloc.c, needs_realloc).
    if (!ggml_gallocr_reserve(device.allocator.get(), graph.graph) ||
        !ggml_gallocr_alloc_graph(device.allocator.get(), graph.graph)) {
        device.tell("it has no memory left for squares");
        return Outcome::unsupported;
    }
    for (const auto & [tensor, numbers] : graph.tables) {
        ggml_backend_tensor_set(tensor, numbers.data(), 0, numbers.size() * sizeof(int32_t));
    }
    // Waits until it is done: the engine writes over the rows as soon as the hook returns.
    ggml_status status = GGML_STATUS_FAILED;
    std::string why    = "it failed to sum them";
    try {
        status = ggml_backend_graph_compute(backend, graph.graph);
    } catch (const std::exception & error) { // of a lost device, or of its memory (ggml-vulkan.cpp)
        why += std::string(": ") + error.what();
    }
    if (status != GGML_STATUS_SUCCESS) {
        device.told = false;
        device.tell(why);
        device.failed = true;
        return Outcome::failed;
    }
    held.has_data = true;
    return Outcome::added;
}

DeviceSums::Outcome DeviceSums::add(const ggml_tensor * rows, size_t weight, size_t slot,
                                    const Shape & shape, bool both) {
    Device * device = device_of(rows);
    if (device == nullptr) {
        return Outcome::unsupported;
    }
    Graph         graph(graph_memory_);
    ggml_tensor * addends = graph.addends(rows, both);
    const int64_t each    = ggml_nrows(rows) / shape.n_mat;
    return run(*device, graph,
               graph.add_up(ggml_reshape_3d(graph.context.get(), addends, addends->ne[0], each,
                                            shape.n_mat)),
               weight, slot, shape);
}

DeviceSums::Outcome DeviceSums::add_routed(const ggml_tensor * rows, size_t weight, size_t slot,
                                           const Shape &                             shape,
                                           const std::vector<std::vector<int32_t>> & rows_of,
                                           bool                                      both) {
    Device * device = device_of(rows);
    if (device == nullptr) {
        return Outcome::unsupported;
    }
    if (ggml_nrows(rows) >= kMaxPadded) {
        device->tell("a graph has too many rows");
        return Outcome::unsupported;
    }
    const size_t n_mat  = static_cast<size_t>(shape.n_mat);
    const size_t row    = static_cast<size_t>(shape.n_in) * sizeof(float) * (both ? 2 : 1);
    const size_t budget = std::max<size_t>(1, kGatherBytes / row);

    // Numbers of rows in a table for each matrix, and the number of a row of zeros.
    std::vector<std::vector<int32_t>> lists(n_mat);
    size_t                            taken = 0;
    bool                              added = false;
    const auto                        flush = [&] {
        Graph         graph(graph_memory_);
        const int64_t n_rows = ggml_nrows(rows);
        ggml_tensor * table  = graph.addends(rows, both);
        table                = ggml_reshape_2d(graph.context.get(), table, table->ne[0], n_rows);
        table                = ggml_pad(graph.context.get(), table, 0, 1, 0, 0);
        int  zeros           = static_cast<int>(n_rows);
        auto longest         = [&] {
            size_t n = 1;
            for (const std::vector<int32_t> & list : lists) {
                n = std::max(n, list.size());
            }
            return n;
        };
        while (longest() > kTogether) {
            std::vector<int32_t> numbers;
            int                  made = 0;
            for (std::vector<int32_t> & list : lists) {
                list.resize((list.size() + kTogether - 1) / kTogether * kTogether, zeros);
                numbers.insert(numbers.end(), list.begin(), list.end());
                const size_t groups = list.size() / kTogether;
                list.clear();
                for (size_t g = 0; g < groups; ++g) {
                    list.push_back(made++);
                }
            }
            numbers.resize(numbers.size() + kTogether, zeros);
            zeros = made;
            table = graph.gather(table, std::move(numbers), static_cast<int64_t>(kTogether));
        }
        const size_t         each = longest();
        std::vector<int32_t> numbers;
        for (std::vector<int32_t> & list : lists) {
            list.resize(each, zeros);
            numbers.insert(numbers.end(), list.begin(), list.end());
            list.clear();
        }
        taken = 0;
        return run(*device, graph,
                   graph.gather(table, std::move(numbers), static_cast<int64_t>(each)), weight,
                   slot, shape);
    };
    for (size_t mat = 0; mat < n_mat; ++mat) {
        for (const int32_t number : rows_of[mat]) {
            lists[mat].push_back(number);
            if (++taken < budget) {
                continue;
            }
            const Outcome outcome = flush();
            if (outcome != Outcome::added) {
                // of what is half done the other half cannot be done elsewhere
                return added ? Outcome::failed : outcome;
            }
            added = true;
        }
    }
    if (taken == 0) {
        return Outcome::added;
    }
    const Outcome outcome = flush();
    return outcome != Outcome::added && added ? Outcome::failed : outcome;
}

bool DeviceSums::fetch_ids(const ggml_tensor * ids, std::vector<int32_t> & out) {
    Device * device = device_of(ids);
    if (device == nullptr) {
        return false;
    }
    Graph         graph(graph_memory_);
    ggml_tensor * packed = ggml_cont(graph.context.get(), graph.view(ids));
    ggml_set_output(packed);
    ggml_build_forward_expand(graph.graph, packed);
    ggml_backend * backend = device->backend.get();
    if (!ggml_backend_supports_op(backend, packed) ||
        !ggml_gallocr_reserve(device->allocator.get(), graph.graph) ||
        !ggml_gallocr_alloc_graph(device->allocator.get(), graph.graph) ||
        ggml_backend_graph_compute(backend, graph.graph) != GGML_STATUS_SUCCESS) {
        return false;
    }
    out.resize(static_cast<size_t>(ggml_nelements(packed)));
    ggml_backend_tensor_get(packed, out.data(), 0, ggml_nbytes(packed));
    return true;
}

int64_t DeviceSums::fetch(const Take & take) {
    int64_t                                                   bytes = 0;
    std::vector<float>                                        sums;
    std::vector<std::pair<size_t, std::pair<size_t, Held *>>> all; // slot, (which device, sums)
    for (size_t d = 0; d < devices_.size(); ++d) {
        for (auto & [slot, held] : devices_[d]->held) {
            if (held.has_data) {
                all.push_back({slot, {d, &held}});
            }
        }
    }
    std::sort(all.begin(), all.end());
    for (auto & [slot, where] : all) {
        Held & held = *where.second;
        sums.resize(static_cast<size_t>(ggml_nelements(held.tensor)));
        ggml_backend_tensor_get(held.tensor, sums.data(), 0, ggml_nbytes(held.tensor));
        bytes += static_cast<int64_t>(ggml_nbytes(held.tensor));
        held.has_data = false;
        take(held.weight, slot, sums.data(), held.tensor->ne[0]);
    }
    return bytes;
}

} // namespace imatrix
