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
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace py = pybind11;

namespace {

// A path or a name: any bytes. pybind11 takes and gives UTF-8 alone.
struct Name {
    std::string bytes;
};

using Data  = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Value = std::variant<bool, int64_t, double, Name>;

py::str text_of(const std::string & bytes) {
    PyObject * text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()),
                                           "surrogateescape");
    if (text == nullptr) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::str>(text);
}

// std::runtime_error would have to be UTF-8. With the GIL only.
[[noreturn]] void fail(const std::string & message) {
    PyErr_SetObject(PyExc_RuntimeError, text_of(message).ptr());
    throw py::error_already_set();
}

} // namespace

namespace pybind11::detail {

// str as Python names files (surrogateescape, imatrix.files.names), or bytes.
template <> struct type_caster<Name> {
    PYBIND11_TYPE_CASTER(Name, const_name("str"));

    bool load(handle source, bool /* convert */) {
        object bytes = reinterpret_borrow<object>(source);
        if (PyUnicode_Check(source.ptr()) != 0) {
            bytes = reinterpret_steal<object>(
                PyUnicode_AsEncodedString(source.ptr(), "utf-8", "surrogateescape"));
            if (!bytes) {
                throw error_already_set();
            }
        }
        if (PyBytes_Check(bytes.ptr()) == 0) {
            return false;
        }
        value.bytes.assign(PyBytes_AS_STRING(bytes.ptr()),
                           static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr())));
        return true;
    }

    static handle cast(const Name & name, return_value_policy /* policy */, handle /* parent */) {
        return text_of(name.bytes).release();
    }
};

} // namespace pybind11::detail

namespace {

// A view into one running quantization: how far it is, why it failed, and a way to end it.
// The engine offers none of these, but it logs each of them from the thread that called it.
struct Watch {
    std::atomic<bool> cancelled{false};
    std::atomic<int>  done{0};   // tensors
    std::atomic<int>  total{0};  // 0: not known yet
    std::string       errors;    // the quantizing thread's, until it returns
    std::string       unsaid;    // log lines with this in them are not handed on
    py::object        on_tensor; // called with (tensors done, total) before each one, if not None
};

thread_local Watch * t_watch = nullptr;

struct Watching {
    explicit Watching(Watch & watch) { t_watch = &watch; }
    ~Watching() { t_watch = nullptr; }
    Watching(const Watching &)             = delete;
    Watching & operator=(const Watching &) = delete;
};

// What a dry run logs: which type every tensor would get, in the quantizer's order. Log lines
// are the only place where llama_model_quantize tells it (the main loop in src/llama-quant.cpp).
//
// llama_quant_compute_types (src/llama-ext.h) would give types without a log, but not those of a
// real run: it takes has_imatrix for false and the embeddings for tied, and both change the
// mixture (llama_tensor_get_type_impl: IQ3_XXS, IQ4_XS, Q4_0, every untied token_embd).
struct DryRun {
    struct Tensor {
        std::string name;
        std::string source;
        std::string target;
    };

    std::vector<Tensor> tensors;
    int                 total = 0; // as the engine counts them
    std::string         errors;

    void read(ggml_log_level level, const std::string & text) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            errors += text;
        }
        int done = 0;
        if (std::sscanf(text.c_str(), "[%d/%d]", &done, &total) == 2) {
            // "[   1/  35] blk.0.attn_k.weight   - [  256,   128,     1,     1], type =    f32, "
            tensors.push_back({between(text, "] ", " - ["), between(text, "], type =", ","), ""});
        } else if (text.compare(0, 4, "size") == 0 && !tensors.empty()) {
            // "size = 0.12 MiB -> 0.01 MiB (iq2_xxs)", or one size for a tensor that is copied
            Tensor & last = tensors.back();
            last.target   = between(text, " MiB (", ")");
            if (last.target.empty()) {
                last.target = last.source;
            }
        }
    }

    bool complete() const {
        return total > 0 && tensors.size() == static_cast<size_t>(total) &&
               !tensors.back().target.empty();
    }

    static std::string between(const std::string & text, const char * from, const char * to) {
        size_t start = text.find(from);
        if (start == std::string::npos) {
            return {};
        }
        start = text.find_first_not_of(' ', start + std::strlen(from));
        // the last one: a name may hold anything
        const size_t end = start == std::string::npos ? start : text.rfind(to);
        if (end == std::string::npos || end <= start) {
            return {};
        }
        return text.substr(start, text.find_last_not_of(' ', end - 1) + 1 - start);
    }
};

thread_local DryRun * t_dry_run = nullptr;

struct DryRunning {
    explicit DryRunning(DryRun & run) { t_dry_run = &run; }
    ~DryRunning() { t_dry_run = nullptr; }
    DryRunning(const DryRunning &)             = delete;
    DryRunning & operator=(const DryRunning &) = delete;
};

std::mutex                     g_install;
std::atomic<ggml_log_callback> g_next{nullptr}; // whoever had the log before
std::atomic<void *>            g_next_data{nullptr};

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (t_dry_run != nullptr) {
        t_dry_run->read(level, text);
        return; // nothing happens in a dry run that anybody else should hear of
    }
    Watch *    watch = t_watch;
    const bool said  = watch == nullptr || watch->unsaid.empty() ||
                       std::strstr(text, watch->unsaid.c_str()) == nullptr;
    if (const ggml_log_callback next = g_next.load(); next != nullptr && said) {
        next(level, text, g_next_data.load());
    }
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
        if (!watch->on_tensor.is_none()) {
            const py::gil_scoped_acquire acquire;
            watch->on_tensor(done - 1, total);
        }
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

// Which of the names a pattern is found in, as the quantizer searches (llama_tensor_get_type in
// src/llama-quant.cpp).
std::vector<bool> matching(const Name & pattern, const std::vector<Name> & names) {
    try {
        const std::regex  compiled(pattern.bytes);
        std::vector<bool> out;
        out.reserve(names.size());
        for (const Name & name : names) {
            out.push_back(std::regex_search(name.bytes, compiled));
        }
        return out;
    } catch (const std::regex_error & error) {
        throw std::invalid_argument(error.what());
    }
}

// (bytes of tensor data, values) of a GGUF file.
std::pair<int64_t, int64_t> tensor_totals(const Name & path) {
    struct Free {
        void operator()(gguf_context * ctx) const { gguf_free(ctx); }
    };
    const std::unique_ptr<gguf_context, Free> file(
        gguf_init_from_file(path.bytes.c_str(), {true, nullptr}));
    if (file == nullptr) {
        fail(path.bytes + ": not a GGUF file");
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

// What the quantizer is asked for, in a dry run and in a real one. It owns what `params` points to.
struct Request {
    llama_model_quantize_params              params = llama_model_quantize_default_params();
    std::vector<std::pair<Name, int>>        rules;
    std::vector<llama_model_tensor_override> overrides;
    std::vector<llama_model_kv_override>     keys;

    Request(int ftype, bool pure, bool quantize_output, std::optional<int> output_tensor_type,
            std::optional<int> token_embedding_type, bool keep_split,
            std::vector<std::pair<Name, int>>                  tensor_types,
            const std::vector<std::pair<std::string, Value>> & metadata)
        : rules(std::move(tensor_types)) {
        params.ftype                  = static_cast<llama_ftype>(ftype);
        params.pure                   = pure;
        params.quantize_output_tensor = quantize_output;
        params.keep_split             = keep_split;
        if (output_tensor_type) {
            params.output_tensor_type = static_cast<ggml_type>(*output_tensor_type);
        }
        if (token_embedding_type) {
            params.token_embedding_type = static_cast<ggml_type>(*token_embedding_type);
        }
        for (const auto & [pattern, type] : rules) {
            overrides.push_back({pattern.bytes.c_str(), static_cast<ggml_type>(type)});
        }
        if (!overrides.empty()) {
            overrides.push_back({nullptr, GGML_TYPE_COUNT});
            params.tt_overrides = overrides.data();
        }
        for (const auto & [key, value] : metadata) {
            keys.push_back(override_of(key, value));
        }
        if (!keys.empty()) {
            keys.push_back({});
            params.kv_overrides = keys.data();
        }
    }
    Request(const Request &)             = delete;
    Request & operator=(const Request &) = delete;

    static llama_model_kv_override override_of(const std::string & key, const Value & value) {
        llama_model_kv_override override{};
        key.copy(override.key, sizeof override.key - 1);
        if (const auto * truth = std::get_if<bool>(&value)) {
            override.tag      = LLAMA_KV_OVERRIDE_TYPE_BOOL;
            override.val_bool = *truth;
        } else if (const auto * whole = std::get_if<int64_t>(&value)) {
            override.tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
            override.val_i64 = *whole;
        } else if (const auto * real = std::get_if<double>(&value)) {
            override.tag     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
            override.val_f64 = *real;
        } else {
            override.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            std::get<Name>(value).bytes.copy(override.val_str, sizeof override.val_str - 1);
        }
        return override;
    }
};

void quantize(Watch & watch, const Name & src, const Name & dst, int ftype, bool pure,
              bool quantize_output, std::optional<int> output_tensor_type,
              std::optional<int> token_embedding_type, bool keep_split,
              std::vector<std::pair<Name, int>>                  tensor_types,
              const std::vector<std::pair<std::string, Value>> & metadata, int n_threads,
              bool allow_requantize, const std::vector<std::pair<Name, Data>> & matrix,
              const std::string & unsaid) {
    watch.unsaid = unsaid;
    Request request(ftype, pure, quantize_output, output_tensor_type, token_embedding_type,
                    keep_split, std::move(tensor_types), metadata);
    request.params.nthread          = n_threads;
    request.params.allow_requantize = allow_requantize;

    // NULL-terminated, as llama-quantize hands them over
    std::vector<llama_model_imatrix_data> data;
    for (const auto & [name, values] : matrix) {
        data.push_back({name.bytes.c_str(), values.data(), static_cast<size_t>(values.size())});
    }
    if (!data.empty()) {
        data.push_back({nullptr, nullptr, 0});
        request.params.imatrix = data.data();
    }
    uint32_t failed;
    {
        const py::gil_scoped_release release;
        listen_to_log();
        const Watching watching(watch);
        failed = llama_model_quantize(src.bytes.c_str(), dst.bytes.c_str(), &request.params);
    }
    if (failed != 0) {
        fail(watch.errors);
    }
    watch.done = watch.total.load();
}

// Values and bytes of a block, by the name of the type.
py::dict type_blocks() {
    py::dict out;
    for (int value = 0; value < GGML_TYPE_COUNT; ++value) {
        const auto type = static_cast<ggml_type>(value);
        if (ggml_blck_size(type) > 0) { // 0: a number that no type has any more
            out[py::str(ggml_type_name(type))] =
                py::make_tuple(ggml_blck_size(type), ggml_type_size(type));
        }
    }
    return out;
}

// (name, type, type it would get) of every tensor, in the order of the quantizer, which reads
// no weight for it. Types that lack data are given all the same: a dry run does not stop there.
std::vector<std::tuple<Name, std::string, std::string>> dry_run(
    const Name & src, int ftype, bool pure, bool quantize_output,
    std::optional<int> output_tensor_type, std::optional<int> token_embedding_type, bool keep_split,
    std::vector<std::pair<Name, int>>                  tensor_types,
    const std::vector<std::pair<std::string, Value>> & metadata, bool has_matrix) {
    Request request(ftype, pure, quantize_output, output_tensor_type, token_embedding_type,
                    keep_split, std::move(tensor_types), metadata);
    request.params.nthread = 1;
    request.params.dry_run = true;

    // the mixture depends on whether there is a matrix, not on what is in it
    const float                    one         = 1.0F;
    const llama_model_imatrix_data something[] = {{"", &one, 1}, {nullptr, nullptr, 0}};
    if (has_matrix) {
        request.params.imatrix = something;
    }
    DryRun run;
    // the log has one reader, and a Collector made meanwhile in another thread may take it over
    for (int attempt = 0; attempt < 3 && !run.complete(); ++attempt) {
        run = {};
        uint32_t failed;
        {
            const py::gil_scoped_release release;
            listen_to_log();
            const DryRunning running(run);
            failed = llama_model_quantize(src.bytes.c_str(), "", &request.params);
        }
        if (failed != 0) {
            fail(run.errors);
        }
    }
    if (!run.complete()) {
        throw std::runtime_error("failed to quantize: no word of " + std::to_string(run.total) +
                                 " tensors in the engine's log");
    }
    std::vector<std::tuple<Name, std::string, std::string>> out;
    for (const auto & tensor : run.tensors) {
        out.emplace_back(Name{tensor.name}, tensor.source, tensor.target);
    }
    return out;
}

} // namespace

PYBIND11_MODULE(quantizer, m) {
    m.doc() = "The engine's quantizer.";
    py::class_<Watch>(m, "Watch")
        .def(py::init([](py::object on_tensor) {
                 auto watch       = std::make_unique<Watch>();
                 watch->on_tensor = std::move(on_tensor);
                 return watch;
             }),
             py::arg("on_tensor") = py::none())
        .def("cancel", [](Watch & watch) { watch.cancelled = true; })
        .def_property_readonly("progress", [](const Watch & watch) {
            return std::pair<int, int>(watch.done, watch.total);
        });
    m.def("ftypes", &ftypes);
    m.def("tensor_types", &tensor_types);
    m.def("matching", &matching, py::arg("pattern"), py::arg("names"));
    m.def("tensor_totals", &tensor_totals, py::arg("path"));
    m.def("type_blocks", &type_blocks);
    m.def("dry_run", &dry_run, py::arg("src"), py::kw_only(), py::arg("ftype"), py::arg("pure"),
          py::arg("quantize_output"), py::arg("output_tensor_type"),
          py::arg("token_embedding_type"), py::arg("keep_split"), py::arg("tensor_types"),
          py::arg("metadata"), py::arg("has_matrix"));
    m.def("quantize", &quantize, py::arg("watch"), py::arg("src"), py::arg("dst"), py::kw_only(),
          py::arg("ftype"), py::arg("pure"), py::arg("quantize_output"),
          py::arg("output_tensor_type"), py::arg("token_embedding_type"), py::arg("keep_split"),
          py::arg("tensor_types"), py::arg("metadata"), py::arg("n_threads"),
          py::arg("allow_requantize"), py::arg("matrix"), py::arg("unsaid"));
}
