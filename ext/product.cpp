#include "product.h"

#include "backend_modules.h"
#include "engine_log.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace imatrix {
namespace {

constexpr size_t kNodes = 8; // more than a graph of one product has

struct FreeContext {
    void operator()(ggml_context * context) const { ggml_free(context); }
};
struct FreeBackend {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};
struct FreeBuffer {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
};
struct FreeScheduler {
    void operator()(ggml_backend_sched_t scheduler) const { ggml_backend_sched_free(scheduler); }
};
template <class Pointer, class Free>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Free>;

using Context   = Owned<ggml_context *, FreeContext>;
using Backend   = Owned<ggml_backend_t, FreeBackend>;
using Buffer    = Owned<ggml_backend_buffer_t, FreeBuffer>;
using Scheduler = Owned<ggml_backend_sched_t, FreeScheduler>;

Context make_context() {
    const size_t size =
        8 * ggml_tensor_overhead() + ggml_graph_overhead_custom(kNodes, /*grads =*/false);
    return Context(ggml_init({size, /*.mem_buffer =*/nullptr, /*.no_alloc =*/true}));
}

bool find_type(const std::string & name, ggml_type & out) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const auto   candidate = static_cast<ggml_type>(type);
        const auto * traits    = ggml_get_type_traits(candidate);
        if (traits->type_name != nullptr && name == traits->type_name && traits->blck_size > 0) {
            out = candidate;
            return true;
        }
    }
    return false;
}

// Devices that multiply beside the host's memory: libraries for the CPU first, then the CPU, as
// the engine asks them.
std::vector<ggml_backend_dev_t> host_devices() {
    std::vector<ggml_backend_dev_t> found;
    for (const auto wanted : {GGML_BACKEND_DEVICE_TYPE_ACCEL, GGML_BACKEND_DEVICE_TYPE_CPU}) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            const ggml_backend_dev_t device = ggml_backend_dev_get(i);
            if (ggml_backend_dev_type(device) == wanted) {
                found.push_back(device);
            }
        }
    }
    return found;
}

struct Place {
    ggml_backend_dev_t         device;
    ggml_backend_buffer_type_t type;
};

// Where the loader may put a weight, best first.
std::vector<Place> places(const std::vector<ggml_backend_dev_t> & devices) {
    std::vector<Place>       found;
    const ggml_backend_dev_t cpu = devices.back();
    for (const ggml_backend_dev_t device : devices) {
        const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
        if (device != cpu && type != ggml_backend_dev_buffer_type(cpu)) {
            found.push_back({device, type});
        }
    }
    using Extra      = ggml_backend_buffer_type_t * (*)(ggml_backend_dev_t device);
    const auto extra = reinterpret_cast<Extra>(ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    for (auto * type = extra == nullptr ? nullptr : extra(cpu); type != nullptr && *type != nullptr;
         ++type) {
        found.push_back({cpu, *type});
    }
    found.push_back({cpu, ggml_backend_dev_buffer_type(cpu)});
    return found;
}

// Whether a device runs a product whose matrix lies in a buffer type.
bool runs(const Place & place, ggml_tensor & matrix, const ggml_tensor & product) {
    const Buffer empty(ggml_backend_buft_alloc_buffer(place.type, 0));
    matrix.buffer         = empty.get();
    const bool is_running = ggml_backend_dev_supports_op(place.device, &product);
    matrix.buffer         = nullptr;
    return is_running;
}

void set_threads(ggml_backend_dev_t device, ggml_backend_t backend, int32_t n_threads) {
    const auto set =
        reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
    if (set != nullptr) {
        set(backend, n_threads);
    }
}

// Values between -1 and 1, the same again after a while. No kernel looks at them.
std::vector<float> some_values(int64_t n) {
    constexpr size_t   kPeriod = 4093;
    std::vector<float> values(static_cast<size_t>(n));
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = i < kPeriod ? std::sin(static_cast<float>(i + 1)) : values[i - kPeriod];
    }
    return values;
}

// The bytes of a tensor whose rows are all the same.
std::vector<char> filled(const ggml_tensor & tensor) {
    const std::vector<float> values = some_values(tensor.ne[0]);
    const size_t             row    = ggml_row_size(tensor.type, tensor.ne[0]);
    std::vector<char>        bytes(ggml_nbytes(&tensor));
    // of one row, which needs no importance data: the types that do are refused before
    ggml_quantize_chunk(tensor.type, values.data(), bytes.data(), 0, 1, tensor.ne[0], nullptr);
    for (size_t at = row; at < bytes.size(); at += row) {
        std::memcpy(bytes.data() + at, bytes.data(), row);
    }
    return bytes;
}

Status check(const ProductParams & params, ggml_type & type) {
    const auto refused = [](const std::string & why) {
        return Status::failed(Code::bad_argument, why);
    };
    if (!find_type(params.type, type)) {
        return refused("no type of weights is called " + params.type);
    }
    if (params.n_in < 1 || params.n_out < 1 || params.n_rows < 1 || params.n_mat < 1 ||
        params.n_threads < 1) {
        return refused("n_in, n_out, n_rows, n_mat and n_threads must be 1 or more");
    }
    const bool is_float = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    if (!is_float && (!ggml_is_quantized(type) || ggml_quantize_requires_imatrix(type))) {
        return refused("nothing is multiplied by " + params.type + " without importance data");
    }
    if (params.n_in % ggml_blck_size(type) != 0) {
        return refused("rows of " + std::to_string(params.n_in) +
                       " values are no multiple of the " + std::to_string(ggml_blck_size(type)) +
                       " of a block of " + params.type);
    }
    return {};
}

} // namespace

struct Product::Engine {
    std::vector<Backend> backends;
    Context              matrices; // the matrix alone: it has a buffer of its own
    Context              inputs;
    Context              nodes;
    Buffer               matrix_buffer;
    Buffer               input_buffer;
    Scheduler            scheduler;
    ggml_cgraph *        graph = nullptr;
    std::string          buffer_type;

    Status make(const ProductParams & params, ggml_type type);
};

Status Product::Engine::make(const ProductParams & params, ggml_type type) {
    const Status no_memory = Status::failed(Code::out_of_memory, "no memory for a product");
    const std::vector<ggml_backend_dev_t> devices = host_devices();
    matrices                                      = make_context();
    inputs                                        = make_context();
    nodes                                         = make_context();
    if (matrices == nullptr || inputs == nullptr || nodes == nullptr) {
        return no_memory;
    }
    const bool    routed = params.n_mat > 1;
    ggml_tensor * matrix =
        ggml_new_tensor_3d(matrices.get(), type, params.n_in, params.n_out, params.n_mat);
    ggml_tensor * rows    = nullptr;
    ggml_tensor * ids     = nullptr;
    ggml_tensor * product = nullptr;
    if (routed) {
        rows    = ggml_new_tensor_3d(inputs.get(), GGML_TYPE_F32, params.n_in, 1, params.n_rows);
        ids     = ggml_new_tensor_2d(inputs.get(), GGML_TYPE_I32, 1, params.n_rows);
        product = ggml_mul_mat_id(nodes.get(), matrix, rows, ids);
    } else {
        rows    = ggml_new_tensor_2d(inputs.get(), GGML_TYPE_F32, params.n_in, params.n_rows);
        product = ggml_mul_mat(nodes.get(), matrix, rows);
    }
    graph = ggml_new_graph_custom(nodes.get(), kNodes, /*grads =*/false);
    ggml_build_forward_expand(graph, product);

    for (const Place & place : places(devices)) {
        if (runs(place, *matrix, *product)) {
            matrix_buffer.reset(
                ggml_backend_alloc_ctx_tensors_from_buft(matrices.get(), place.type));
            buffer_type = ggml_backend_buft_name(place.type);
            break;
        }
    }
    if (buffer_type.empty()) {
        return Status::failed(Code::engine_failed,
                              "no device here multiplies by weights of " + params.type);
    }
    input_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(
        inputs.get(), ggml_backend_dev_buffer_type(devices.back())));
    if (matrix_buffer == nullptr || input_buffer == nullptr) {
        return no_memory;
    }
    ggml_backend_buffer_set_usage(matrix_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    const std::vector<char> bytes = filled(*matrix);
    ggml_backend_tensor_set(matrix, bytes.data(), 0, bytes.size());
    const std::vector<float> values = some_values(ggml_nelements(rows));
    ggml_backend_tensor_set(rows, values.data(), 0, ggml_nbytes(rows));
    if (routed) {
        std::vector<int32_t> experts(static_cast<size_t>(params.n_rows));
        for (size_t i = 0; i < experts.size(); ++i) {
            experts[i] = static_cast<int32_t>(i % static_cast<size_t>(params.n_mat));
        }
        ggml_backend_tensor_set(ids, experts.data(), 0, ggml_nbytes(ids));
    }

    std::vector<ggml_backend_t> order;
    for (const ggml_backend_dev_t device : devices) {
        backends.emplace_back(ggml_backend_dev_init(device, nullptr));
        if (backends.back() == nullptr) {
            return engine_error(Code::engine_failed,
                                std::string("no backend on ") + ggml_backend_dev_name(device));
        }
        set_threads(device, backends.back().get(), params.n_threads);
        order.push_back(backends.back().get());
    }
    scheduler.reset(ggml_backend_sched_new(order.data(), nullptr, static_cast<int>(order.size()),
                                           kNodes, /*parallel =*/false, /*op_offload =*/true));
    if (!ggml_backend_sched_alloc_graph(scheduler.get(), graph)) {
        return no_memory;
    }
    return {};
}

Product::Product() = default;

Product::~Product() = default;

Status Product::open(const ProductParams & params) {
    Status status = load_backends();
    if (!status.ok()) {
        return status;
    }
    ggml_type type = GGML_TYPE_COUNT;
    status         = check(params, type);
    if (!status.ok()) {
        return status;
    }
    clear_error();
    return guarded("for a product", [&] {
        auto   engine = std::make_unique<Engine>();
        Status made   = engine->make(params, type);
        if (made.ok()) {
            engine_ = std::move(engine);
        }
        return made;
    });
}

Status Product::run(double & seconds) {
    if (engine_ == nullptr) {
        return Status::failed(Code::bad_argument, "the product was not opened");
    }
    const auto        started = std::chrono::steady_clock::now();
    const ggml_status done =
        ggml_backend_sched_graph_compute(engine_->scheduler.get(), engine_->graph);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (done != GGML_STATUS_SUCCESS) {
        return engine_error(Code::engine_failed, "the engine could not multiply");
    }
    return {};
}

std::string Product::buffer_type() const {
    return engine_ == nullptr ? std::string() : engine_->buffer_type;
}

} // namespace imatrix
