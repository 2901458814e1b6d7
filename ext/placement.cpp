#include "placement.h"

#include "ggml-backend.h"
#include "llama-ext.h"

#include <algorithm>
#include <memory>
#include <regex>

namespace imatrix {
namespace {

// The devices that layers can be put on, as -dev takes them (common/arg.cpp): all but the CPU.
std::vector<ggml_backend_dev_t> offload_devices() {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            found.push_back(device);
        }
    }
    return found;
}

std::string listed(const std::vector<std::string> & names) {
    std::string out;
    for (const std::string & name : names) {
        out += (out.empty() ? "" : ", ") + name;
    }
    return out.empty() ? "none" : out;
}

std::string names_of(const std::vector<ggml_backend_dev_t> & devices) {
    std::vector<std::string> names;
    for (const ggml_backend_dev_t device : devices) {
        names.emplace_back(ggml_backend_dev_name(device));
    }
    return listed(names);
}

// How many devices the engine would divide a model over; -1 if it cannot say: the load itself will
// fail then and say why.
int64_t count_devices(const std::string & model, llama_model_params params) {
    if (params.split_mode == LLAMA_SPLIT_MODE_TENSOR) {
        // one device made of these (llama.cpp, llama_prepare_model_devices)
        const std::vector<ggml_backend_dev_t> all = offload_devices();
        return std::count_if(all.begin(), all.end(), [](ggml_backend_dev_t device) {
            return ggml_backend_dev_buffer_type(device) != ggml_backend_cpu_buffer_type();
        });
    }
    params.split_mode = LLAMA_SPLIT_MODE_LAYER; // "none" is not divided: it has all to choose from
    params.tensor_split = nullptr;
    params.vocab_only   = true; // no tensors: the file's header alone is read
    params.load_mode    = LLAMA_LOAD_MODE_NONE;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> found(
        llama_model_load_from_file(model.c_str(), params), llama_model_free);
    return found == nullptr ? -1 : llama_model_n_devices(found.get());
}

} // namespace

Status EnginePlacement::set(const Placement & placement, const std::string & model,
                            llama_model_params & params) {
    const std::pair<const char *, llama_split_mode> modes[] = {
        {"none", LLAMA_SPLIT_MODE_NONE},
        {"layer", LLAMA_SPLIT_MODE_LAYER},
        {"row", LLAMA_SPLIT_MODE_ROW},
        {"tensor", LLAMA_SPLIT_MODE_TENSOR},
    };
    const auto mode = std::find_if(std::begin(modes), std::end(modes), [&](const auto & known) {
        return placement.split_mode == known.first;
    });
    if (mode == std::end(modes)) {
        return Status::failed(Code::bad_argument, "there is no split mode " + placement.split_mode);
    }
    params.split_mode = mode->second;
    params.main_gpu   = placement.main_gpu;
    Status status     = set_devices(placement);
    if (status.ok() && !devices_.empty()) {
        params.devices = devices_.data();
    }
    if (status.ok()) {
        status = set_overrides(placement);
    }
    if (status.ok() && !overrides_.empty()) {
        params.tensor_buft_overrides = overrides_.data();
    }
    if (status.ok()) {
        status = set_split(placement, model, params);
    }
    if (status.ok() && !split_.empty()) {
        params.tensor_split = split_.data();
    }
    return status;
}

Status EnginePlacement::set_devices(const Placement & placement) {
    if (!placement.chosen_devices) {
        return {};
    }
    const std::vector<ggml_backend_dev_t> all = offload_devices();
    for (const std::string & name : placement.devices) {
        const ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
        if (std::find(all.begin(), all.end(), device) == all.end()) {
            return Status::failed(Code::bad_argument,
                                  "there is no device '" + name +
                                      "' to put layers on; there are: " + names_of(all));
        }
        if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) {
            return Status::failed(Code::bad_argument, "device '" + name + "' is named twice");
        }
        devices_.push_back(device);
    }
    devices_.push_back(nullptr);
    return {};
}

Status EnginePlacement::set_split(const Placement & placement, const std::string & model,
                                  const llama_model_params & params) {
    if (placement.tensor_split.empty()) {
        return {};
    }
    const int64_t given = static_cast<int64_t>(placement.tensor_split.size());
    int64_t       n     = static_cast<int64_t>(devices_.size()) - 1; // without the NULL
    if (!placement.chosen_devices) {
        n = count_devices(model, params);
    }
    // Without a device there is nothing to divide: the engine takes the CPU, whatever the shares.
    if (n > 0 && given > n) {
        std::string has = std::to_string(n) + (n == 1 ? " device" : " devices");
        if (placement.chosen_devices) {
            has += " named";
        } else {
            has += " here (of these: " + names_of(offload_devices()) + ")";
        }
        return Status::failed(Code::bad_argument, "tensor_split has " + std::to_string(given) +
                                                      " shares, but there " +
                                                      (n == 1 ? "is " : "are ") + has);
    }
    // llama.cpp reads that many, given or not (llama_model::llama_model)
    split_.assign(std::max(llama_max_devices(), placement.tensor_split.size()), 0.0f);
    std::copy(placement.tensor_split.begin(), placement.tensor_split.end(), split_.begin());
    return {};
}

Status EnginePlacement::set_overrides(const Placement & placement) {
    if (placement.overrides.empty()) {
        return {};
    }
    std::vector<std::pair<std::string, ggml_backend_buffer_type_t>> known;
    std::vector<std::string>                                        names;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_buffer_type_t type =
            ggml_backend_dev_buffer_type(ggml_backend_dev_get(i));
        const std::string name = type == nullptr ? "" : ggml_backend_buft_name(type);
        if (type != nullptr && std::find(names.begin(), names.end(), name) == names.end()) {
            known.emplace_back(name, type);
            names.push_back(name);
        }
    }
    for (const auto & [pattern, buffer] : placement.overrides) {
        int64_t      none;
        const Status status = find_name(pattern, {}, none);
        if (!status.ok()) {
            return status;
        }
        const auto type =
            std::find_if(known.begin(), known.end(),
                         [&, &buffer = buffer](const auto & each) { return each.first == buffer; });
        if (type == known.end()) {
            return Status::failed(Code::bad_argument,
                                  "there is no buffer type '" + buffer +
                                      "' to put tensors into; there are: " + listed(names));
        }
        overrides_.push_back({pattern.c_str(), type->second});
    }
    overrides_.push_back({nullptr, nullptr});
    return {};
}

Status find_name(const std::string & pattern, const std::vector<std::string> & names,
                 int64_t & found) {
    found = -1;
    try {
        const std::regex expression(pattern);
        for (size_t i = 0; i < names.size(); ++i) {
            if (std::regex_search(names[i], expression)) {
                found = static_cast<int64_t>(i);
                break;
            }
        }
    } catch (const std::regex_error & error) {
        return Status::failed(Code::bad_argument,
                              "'" + pattern + "' is no regular expression: " + error.what());
    }
    return {};
}

} // namespace imatrix
