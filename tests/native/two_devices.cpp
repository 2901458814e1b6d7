// A backend as a module, with two devices that call themselves GPUs: Sound0 computes, Broken1
// cannot be used. In what way, the environment variable BROKEN says: "init", "memory", "context" or
// "compute", the last two as CUDA's backend ends the process.
// They compute with the CPU's backend, which their process has to have.

#include "ggml-backend-impl.h" // the interface that every backend of the engine fills in
#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kMemory = size_t{1} << 34; // more than any test takes

struct Device {
    const char * name;
    bool         broken;
};
Device g_devices[] = {{"Sound0", false}, {"Broken1", true}};

bool broken(ggml_backend_dev_t device, const char * way) {
    const char * wanted = std::getenv("BROKEN");
    return static_cast<Device *>(device->context)->broken && wanted != nullptr &&
           std::strcmp(wanted, way) == 0;
}

const char * name_of(ggml_backend_dev_t device) {
    return static_cast<Device *>(device->context)->name;
}

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// --- buffers: the CPU's, under the device's name -----------------------------

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    if (broken(type->device, "memory")) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer =
        ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(cpu()), size);
    if (buffer != nullptr) {
        buffer->buft = type;
    }
    return buffer;
}

ggml_backend_buffer_type_t type_of(ggml_backend_dev_t device) {
    static ggml_backend_buffer_type types[2];
    ggml_backend_buffer_type &      type = types[static_cast<Device *>(device->context)->broken];
    type.iface.get_name                  = [](ggml_backend_buffer_type_t of) {
        return name_of(of->device);
    };
    type.iface.alloc_buffer  = allocate;
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) {
        return size_t{64};
    };
    type.iface.is_host = [](ggml_backend_buffer_type_t) {
        return true;
    };
    type.device = device;
    return &type;
}

// as CUDA's backend does (ggml_cuda_error in ggml-cuda.cu)
void end(const char * why) {
    GGML_LOG_ERROR("CUDA error: %s\n", why);
    GGML_LOG_ERROR("  current device: 1, in function two at two_devices.cpp:1\n");
    ggml_abort("/src/ggml-cuda/ggml-cuda.cu", 109, "CUDA error");
}

// --- the backend: the CPU's, behind the device --------------------------------

ggml_backend_t inner(ggml_backend_t backend) {
    return static_cast<ggml_backend_t>(backend->context);
}

ggml_backend_t init(ggml_backend_dev_t device, const char *) {
    if (broken(device, "init")) {
        return nullptr;
    }
    if (broken(device, "context")) {
        end("out of memory");
    }
    static ggml_guid guid = {'i', 'm', 'a', 't', 'r', 'i', 'x', '-', 't', 'w', 'o'};
    auto *           made = new ggml_backend{};
    made->guid            = &guid;
    made->iface.get_name  = [](ggml_backend_t backend) {
        return name_of(backend->device);
    };
    made->iface.free = [](ggml_backend_t backend) {
        ggml_backend_free(inner(backend));
        delete backend;
    };
    made->iface.graph_compute = [](ggml_backend_t backend, ggml_cgraph * graph) {
        if (broken(backend->device, "compute")) { // its code was made for other cards
            end("no kernel image is available for execution on the device");
        }
        return ggml_backend_graph_compute(inner(backend), graph);
    };
    made->device  = device;
    made->context = ggml_backend_dev_init(cpu(), nullptr);
    return made;
}

// --- devices -----------------------------------------------------------------

void tell_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = kMemory; }

ggml_backend_dev_t device_of(ggml_backend_reg_t registry, size_t index) {
    static ggml_backend_device devices[2];
    ggml_backend_device &      device = devices[index];
    device.context                    = &g_devices[index];
    device.reg                        = registry;
    device.iface.get_name             = name_of;
    device.iface.get_description      = name_of;
    device.iface.get_memory           = tell_memory;
    device.iface.get_type             = [](ggml_backend_dev_t) {
        return GGML_BACKEND_DEVICE_TYPE_GPU;
    };
    device.iface.get_props = [](ggml_backend_dev_t of, ggml_backend_dev_props * props) {
        *props             = {};
        props->name        = name_of(of);
        props->description = name_of(of);
        props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
        tell_memory(of, &props->memory_free, &props->memory_total);
    };
    device.iface.init_backend    = init;
    device.iface.get_buffer_type = type_of;
    device.iface.supports_op     = [](ggml_backend_dev_t, const ggml_tensor * node) {
        return ggml_backend_dev_supports_op(cpu(), node);
    };
    device.iface.supports_buft = [](ggml_backend_dev_t of, ggml_backend_buffer_type_t type) {
        return type == type_of(of);
    };
    return &device;
}

ggml_backend_reg_t two_devices() {
    static ggml_backend_reg registry = [] {
        ggml_backend_reg made = {};
        made.api_version      = GGML_BACKEND_API_VERSION;
        made.iface.get_name   = [](ggml_backend_reg_t) {
            return "Two";
        };
        made.iface.get_device_count = [](ggml_backend_reg_t) {
            return size_t{2};
        };
        made.iface.get_device = device_of;
        return made;
    }();
    return &registry;
}

} // namespace

// what GGML_BACKEND_DL_IMPL writes where the engine itself is built with modules
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    return two_devices();
}
