#include "far_device.h"

#include "ggml-backend-impl.h" // the interface that every backend of the engine fills in

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#define IMATRIX_PROTECT 1
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace imatrix::testing {
namespace {

struct Pages {
    void * base = nullptr;
    size_t size = 0;
};

std::vector<Pages *> g_pages;       // of all buffers; tests use one thread
int                  g_open    = 0; // how many Access are alive
const char *         g_refused = nullptr;
bool                 g_lost    = false;

void protect(const Pages & pages, bool readable) {
#ifdef IMATRIX_PROTECT
    mprotect(pages.base, pages.size, readable ? PROT_READ | PROT_WRITE : PROT_NONE);
#else
    (void) pages;
    (void) readable;
#endif
}

// While one is alive, the device's memory can be read and written.
struct Access {
    Access() {
        if (g_open++ == 0) {
            std::for_each(g_pages.begin(), g_pages.end(), [](Pages * p) { protect(*p, true); });
        }
    }
    ~Access() {
        if (--g_open == 0) {
            std::for_each(g_pages.begin(), g_pages.end(), [](Pages * p) { protect(*p, false); });
        }
    }
    Access(const Access &)             = delete;
    Access & operator=(const Access &) = delete;
};

Pages * allocate(size_t size) {
    auto * pages = new Pages;
#ifdef IMATRIX_PROTECT
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    pages->size       = (size + page) / page * page;
    pages->base       = mmap(nullptr, pages->size, g_open > 0 ? PROT_READ | PROT_WRITE : PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages->base == MAP_FAILED) {
        delete pages;
        return nullptr;
    }
#else
    pages->size = size + 64;
    pages->base = std::calloc(1, pages->size);
#endif
    g_pages.push_back(pages);
    return pages;
}

void release(Pages * pages) {
    g_pages.erase(std::find(g_pages.begin(), g_pages.end(), pages));
#ifdef IMATRIX_PROTECT
    munmap(pages->base, pages->size);
#else
    std::free(pages->base);
#endif
    delete pages;
}

// --- buffer ----------------------------------------------------------------

Pages * pages_of(ggml_backend_buffer_t buffer) { return static_cast<Pages *>(buffer->context); }

void   buffer_free(ggml_backend_buffer_t buffer) { release(pages_of(buffer)); }
void * buffer_base(ggml_backend_buffer_t buffer) { return pages_of(buffer)->base; }

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset,
                   size_t size) {
    const Access access;
    std::memset(static_cast<char *>(tensor->data) + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset,
                size_t size) {
    const Access access;
    std::memcpy(static_cast<char *>(tensor->data) + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset,
                size_t size) {
    const Access access;
    std::memcpy(data, static_cast<const char *>(tensor->data) + offset, size);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const Access access;
    std::memset(pages_of(buffer)->base, value, pages_of(buffer)->size);
}

// --- buffer type -----------------------------------------------------------

const char * type_name(ggml_backend_buffer_type_t) { return "Far"; }
size_t       type_alignment(ggml_backend_buffer_type_t) { return 64; }
bool         type_is_host(ggml_backend_buffer_type_t) { return false; }

ggml_backend_buffer_t type_allocate(ggml_backend_buffer_type_t type, size_t size) {
    Pages * pages = allocate(size);
    if (pages == nullptr) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = buffer_free;
    iface.get_base              = buffer_base;
    iface.memset_tensor         = buffer_memset;
    iface.set_tensor            = buffer_set;
    iface.get_tensor            = buffer_get;
    iface.clear                 = buffer_clear;
    return ggml_backend_buffer_init(type, iface, pages, size);
}

ggml_backend_buffer_type_t far_type() {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type made = {};
        made.iface.get_name           = type_name;
        made.iface.alloc_buffer       = type_allocate;
        made.iface.get_alignment      = type_alignment;
        made.iface.is_host            = type_is_host;
        made.device                   = far_device();
        return made;
    }();
    return &type;
}

// --- backend ---------------------------------------------------------------

const char * backend_name(ggml_backend_t) { return "Far0"; }

void backend_free(ggml_backend_t backend) {
    ggml_backend_free(static_cast<ggml_backend_t>(backend->context));
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    if (g_lost) {
        throw std::runtime_error("ErrorDeviceLost");
    }
    const Access access;
    return ggml_backend_graph_compute(static_cast<ggml_backend_t>(backend->context), graph);
}

// --- device ----------------------------------------------------------------

const char * device_name(ggml_backend_dev_t) { return "Far0"; }
const char * device_description(ggml_backend_dev_t) { return "the CPU behind a wall"; }

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free  = 0;
    *total = 0;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_props(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = "Far0";
    props->description = "the CPU behind a wall";
    props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid     = {'i', 'm', 'a', 't', 'r', 'i', 'x', '-', 'f', 'a', 'r'};
    auto *           made     = new ggml_backend;
    made->guid                = &guid;
    made->iface               = {};
    made->iface.get_name      = backend_name;
    made->iface.free          = backend_free;
    made->iface.graph_compute = backend_compute;
    made->device              = device;
    made->context             = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    return made;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return far_type(); }
bool                       device_supports_op(ggml_backend_dev_t, const ggml_tensor * node) {
    return g_refused == nullptr || std::strcmp(ggml_op_name(node->op), g_refused) != 0;
}

bool device_supports_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == far_type();
}

} // namespace

ggml_backend_dev_t far_device() {
    static ggml_backend_device device = [] {
        ggml_backend_device made   = {};
        made.iface.get_name        = device_name;
        made.iface.get_description = device_description;
        made.iface.get_memory      = device_memory;
        made.iface.get_type        = device_type;
        made.iface.get_props       = device_props;
        made.iface.init_backend    = device_init;
        made.iface.get_buffer_type = device_buffer_type;
        made.iface.supports_op     = device_supports_op;
        made.iface.supports_buft   = device_supports_type;
        return made;
    }();
    return &device;
}

void far_device_refuse(const char * op) { g_refused = op; }
void far_device_lose(bool lost) { g_lost = lost; }

bool far_device_protects() {
#ifdef IMATRIX_PROTECT
    return true;
#else
    return false;
#endif
}

} // namespace imatrix::testing
