#include "engine_info.h"

#include "backend_modules.h"

#include "ggml-backend.h"
#include "llama.h"

#include <cstdlib>
#include <mutex>
#include <set>

namespace imatrix {

namespace {

// A server forgets every graph it was sent when any buffer on it is freed (rpc_server::free_buffer
// in ggml-rpc.cpp), and the client, which is not told, goes on asking for them by number
// (rpc_dispatcher::graph_compute): "graph with uid N not found", and the engine ends the process.
// Sums on the device, a second model, or a context that goes away all free buffers. A graph that
// is made anew for each batch has a new number, so it is sent again. The engine asks for that by
// this variable alone, each time it makes a context (llama-context.cpp).
void keep_graphs_from_reuse() {
#ifdef _WIN32
    _putenv_s("LLAMA_GRAPH_REUSE_DISABLE", "1");
#else
    setenv("LLAMA_GRAPH_REUSE_DISABLE", "1", 1);
#endif
}

} // namespace

std::vector<std::string> backend_names() {
    load_backends();
    std::vector<std::string> names;
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        names.emplace_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    return names;
}

std::vector<Device> devices() {
    load_backends();
    std::vector<Device> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        Device                   device;
        size_t                   memory_free = 0;
        size_t                   memory_all  = 0;
        ggml_backend_dev_memory(dev, &memory_free, &memory_all);
        device.backend     = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
        device.name        = ggml_backend_dev_name(dev);
        device.description = ggml_backend_dev_description(dev);
        device.buffer_type = ggml_backend_buft_name(ggml_backend_dev_buffer_type(dev));
        device.gpu         = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU ||
                             ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_IGPU;
        device.memory_free = memory_free;
        device.memory_all  = memory_all;
        found.push_back(std::move(device));
    }
    return found;
}

Status add_rpc_server(const std::string & endpoint) {
    static std::mutex            mutex;
    static std::set<std::string> known; // registering one again would list its devices twice
    Status                       status = load_backends();
    if (!status.ok()) {
        return status;
    }
    const ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        return Status::failed(Code::engine_failed, "this build has no RPC backend (GGML_RPC=ON)");
    }
    // as llama.cpp's --rpc does it (common/arg.cpp)
    using Add      = ggml_backend_reg_t (*)(const char * endpoint);
    const auto add = reinterpret_cast<Add>(
        ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.count(endpoint) > 0) {
        return {};
    }
    const ggml_backend_reg_t server = add == nullptr ? nullptr : add(endpoint.c_str());
    if (server == nullptr) {
        return Status::failed(Code::engine_failed, endpoint + ": the RPC server has no device");
    }
    keep_graphs_from_reuse();
    ggml_backend_register(server);
    known.insert(endpoint);
    return {};
}

std::string engine_version() { return llama_version(); }
std::string engine_build() { return IMATRIX_ENGINE_BUILD; }
std::string system_info() { return llama_print_system_info(); }

} // namespace imatrix
