// pybind11 over the engine's quantizer. Arguments in, exceptions out; the matrix arrives as
// plain float32 vectors, the policy of what goes in lives in quantize.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace py = pybind11;

namespace {

using Data  = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Value = std::variant<int64_t, std::string>;

// A view into one running quantization: how far it is, why it failed, and a way to end it.
// The engine offers none of these, but it logs each of them from the thread that called it.
struct Watch {
    std::atomic<bool> cancelled{false};
    std::atomic<int>  done{0};  // tensors
    std::atomic<int>  total{0}; // 0: not known yet
    std::string       errors;   // the quantizing thread's, until it returns
};

thread_local Watch * t_watch = nullptr;

struct Watching {
    explicit Watching(Watch & watch) { t_watch = &watch; }
    ~Watching() { t_watch = nullptr; }
    Watching(const Watching &)             = delete;
    Watching & operator=(const Watching &) = delete;
};

std::mutex                     g_install;
std::atomic<ggml_log_callback> g_next{nullptr}; // whoever had the log before
std::atomic<void *>            g_next_data{nullptr};

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (const ggml_log_callback next = g_next.load()) {
        next(level, text, g_next_data.load());
    }
    Watch * watch = t_watch;
    if (watch == nullptr) {
        return;
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        watch->errors += text;
    }
    int done  = 0;
    int total = 0;
    // the head of the loop over tensors: no worker thread runs, so leaving here by an
    // exception, which llama_model_quantize catches, is as safe as its own throws
    if (std::sscanf(text, "[%d/%d]", &done, &total) == 2) {
        watch->done  = done - 1;
        watch->total = total;
        if (watch->cancelled) {
            throw std::runtime_error("cancelled by the caller");
        }
    }
}

void listen_to_log() {
    const std::lock_guard<std::mutex> lock(g_install);
    ggml_log_callback                 current = nullptr;
    void *                            data    = nullptr;
    llama_log_get(&current, &data);
    if (current != on_log) {
        g_next      = current;
        g_next_data = data;
        llama_log_set(on_log, nullptr);
    }
}

// Every file type of this engine: name as llama.cpp prints it -> number.
py::dict ftypes() {
    const std::string unknown = llama_ftype_name(static_cast<llama_ftype>(LLAMA_FTYPE_GUESSED - 1));
    py::dict          out;
    for (int value = 0; value < 256; ++value) {
        const char * name = llama_ftype_name(static_cast<llama_ftype>(value));
        if (name != nullptr && name != unknown) {
            out[py::str(name)] = value;
        }
    }
    return out;
}

// Every type that a tensor can be quantized to, and whether ggml_quantize_chunk insists on
// importance data for it. The engine aborts on the other types (ggml.c).
py::dict tensor_types() {
    py::dict out;
    for (int value = 0; value < GGML_TYPE_COUNT; ++value) {
        const auto   type   = static_cast<ggml_type>(value);
        const auto * traits = ggml_get_type_traits(type);
        const bool plain = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
        // q8_1 and q8_K exist only as the other side of a dot product: nothing reads them back
        if (plain || (ggml_is_quantized(type) && traits->to_float != nullptr)) {
            out[py::str(ggml_type_name(type))] =
                py::make_tuple(value, ggml_quantize_requires_imatrix(type));
        }
    }
    return out;
}

// (bytes of tensor data, values) of a GGUF file.
std::pair<int64_t, int64_t> tensor_totals(const std::string & path) {
    struct Free {
        void operator()(gguf_context * ctx) const { gguf_free(ctx); }
    };
    const std::unique_ptr<gguf_context, Free> file(
        gguf_init_from_file(path.c_str(), {true, nullptr}));
    if (file == nullptr) {
        throw std::runtime_error(path + ": not a GGUF file");
    }
    int64_t bytes  = 0;
    int64_t values = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(file.get()); ++i) {
        const ggml_type type = gguf_get_tensor_type(file.get(), i);
        const auto      size = static_cast<int64_t>(gguf_get_tensor_size(file.get(), i));
        bytes += size;
        values += size / static_cast<int64_t>(ggml_type_size(type)) * ggml_blck_size(type);
    }
    return {bytes, values};
}

void quantize(Watch & watch, const std::string & src, const std::string & dst, int ftype,
              int n_threads, bool allow_requantize, bool pure, bool quantize_output,
              const std::vector<std::pair<std::string, Data>> &  matrix,
              const std::vector<std::pair<std::string, int>> &   tensor_types,
              const std::vector<std::pair<std::string, Value>> & metadata) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype                       = static_cast<llama_ftype>(ftype);
    params.nthread                     = n_threads;
    params.allow_requantize            = allow_requantize;
    params.pure                        = pure;
    params.quantize_output_tensor      = quantize_output;

    // NULL-terminated, as llama-quantize hands them over
    std::vector<llama_model_imatrix_data> data;
    for (const auto & [name, values] : matrix) {
        data.push_back({name.c_str(), values.data(), static_cast<size_t>(values.size())});
    }
    if (!data.empty()) {
        data.push_back({nullptr, nullptr, 0});
        params.imatrix = data.data();
    }
    std::vector<llama_model_tensor_override> overrides;
    for (const auto & [pattern, type] : tensor_types) {
        overrides.push_back({pattern.c_str(), static_cast<ggml_type>(type)});
    }
    if (!overrides.empty()) {
        overrides.push_back({nullptr, GGML_TYPE_COUNT});
        params.tt_overrides = overrides.data();
    }
    std::vector<llama_model_kv_override> keys;
    for (const auto & [key, value] : metadata) {
        llama_model_kv_override override{};
        key.copy(override.key, sizeof override.key - 1);
        if (const auto * number = std::get_if<int64_t>(&value)) {
            override.tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
            override.val_i64 = *number;
        } else {
            override.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            std::get<std::string>(value).copy(override.val_str, sizeof override.val_str - 1);
        }
        keys.push_back(override);
    }
    if (!keys.empty()) {
        keys.push_back({});
        params.kv_overrides = keys.data();
    }
    uint32_t failed;
    {
        const py::gil_scoped_release release;
        listen_to_log();
        const Watching watching(watch);
        failed = llama_model_quantize(src.c_str(), dst.c_str(), &params);
    }
    if (failed != 0) {
        throw std::runtime_error(watch.errors);
    }
    watch.done = watch.total.load();
}

} // namespace

PYBIND11_MODULE(_quantize_pybind, m) {
    m.doc() = "The engine's quantizer.";
    py::class_<Watch>(m, "Watch")
        .def(py::init<>())
        .def("cancel", [](Watch & watch) { watch.cancelled = true; })
        .def_property_readonly("progress", [](const Watch & watch) {
            return std::pair<int, int>(watch.done, watch.total);
        });
    m.def("ftypes", &ftypes);
    m.def("tensor_types", &tensor_types);
    m.def("tensor_totals", &tensor_totals, py::arg("path"));
    m.def("quantize", &quantize, py::arg("watch"), py::arg("src"), py::arg("dst"), py::kw_only(),
          py::arg("ftype"), py::arg("n_threads"), py::arg("allow_requantize"), py::arg("pure"),
          py::arg("quantize_output"), py::arg("matrix"), py::arg("tensor_types"),
          py::arg("metadata"));
}
