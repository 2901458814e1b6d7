// pybind11 over the engine's quantizer. Arguments in, exceptions out; the matrix arrives as
// plain float32 vectors, the policy of what goes in lives in quantize.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "llama.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Data = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Every file type of this engine: name as llama.cpp prints it -> number.
py::dict ftypes() {
    py::dict out;
    for (int value = 0; value < 256; ++value) {
        const char * name = llama_ftype_name(static_cast<llama_ftype>(value));
        if (name != nullptr) {
            out[py::str(name)] = value;
        }
    }
    return out;
}

void quantize(const std::string & src, const std::string & dst, int ftype, int n_threads,
              bool allow_requantize, bool pure, bool quantize_output,
              const std::vector<std::pair<std::string, Data>> & matrix,
              const std::vector<std::pair<std::string, int>> & tensor_types,
              const std::vector<std::tuple<std::string, std::string>> & metadata) {
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
        override.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        key.copy(override.key, sizeof override.key - 1);
        value.copy(override.val_str, sizeof override.val_str - 1);
        keys.push_back(override);
    }
    if (!keys.empty()) {
        keys.push_back({});
        params.kv_overrides = keys.data();
    }
    uint32_t failed;
    {
        const py::gil_scoped_release release;
        failed = llama_model_quantize(src.c_str(), dst.c_str(), &params);
    }
    if (failed != 0) {
        throw std::runtime_error("the engine could not quantize " + src);
    }
}

} // namespace

PYBIND11_MODULE(_quantize_pybind, m) {
    m.doc() = "The engine's quantizer.";
    m.def("ftypes", &ftypes);
    m.def("quantize", &quantize, py::arg("src"), py::arg("dst"), py::kw_only(), py::arg("ftype"),
          py::arg("n_threads"), py::arg("allow_requantize"), py::arg("pure"),
          py::arg("quantize_output"), py::arg("matrix"), py::arg("tensor_types"),
          py::arg("metadata"));
}
