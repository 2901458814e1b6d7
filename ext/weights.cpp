#include "weights.h"

#include "engine_log.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace imatrix {
namespace {

// Values that a thread converts at a time: enough that a task's own cost does not count, few enough
// that the threads end together. The same for any number of threads, so that errors add up the
// same.
constexpr int64_t kValuesATask = 1 << 16;

bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

void to_float(ggml_type type, const char * data, float * out, int64_t n) {
    switch (type) {
        case GGML_TYPE_F16:
            ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t *>(data), out, n);
            break;
        case GGML_TYPE_BF16:
            ggml_bf16_to_fp32_row(reinterpret_cast<const ggml_bf16_t *>(data), out, n);
            break;
        default: std::memcpy(out, data, static_cast<size_t>(n) * sizeof(float));
    }
}

void from_float(ggml_type type, const float * values, char * out, int64_t n) {
    switch (type) {
        case GGML_TYPE_F16:
            ggml_fp32_to_fp16_row(values, reinterpret_cast<ggml_fp16_t *>(out), n);
            break;
        case GGML_TYPE_BF16:
            ggml_fp32_to_bf16_row(values, reinterpret_cast<ggml_bf16_t *>(out), n);
            break;
        default: std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
    }
}

// Whether the buffer takes and gives a tensor as its file has it. The extra buffers of the CPU keep
// weights in an order of their own (ggml-cpu/repack.cpp, amx.cpp, kleidiai.cpp) and give none back.
bool is_plain(const ggml_tensor & tensor) {
    if (tensor.buffer == nullptr || tensor.data == nullptr) {
        return false;
    }
    const ggml_backend_buffer_type_t type   = ggml_backend_buffer_get_type(tensor.buffer);
    const ggml_backend_dev_t         device = ggml_backend_buft_get_device(type);
    return ggml_backend_buffer_is_host(tensor.buffer) || device == nullptr ||
           ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

Status refused(const FileWeight & weight, const std::string & why) {
    return Status::failed(Code::bad_argument, weight.name + ": " + why);
}

} // namespace

Weights::Weights(const Model & model, const Model * head) {
    add(model, "");
    if (head != nullptr && head->get() != model.get()) {
        add(*head, head->head_prefix());
    }
}

void Weights::add(const Model & model, const std::string & prefix) {
    for (const auto & [plain, tensor] : llama_internal_get_tensor_map(model.get())) {
        const std::string name   = prefix + plain;
        Places &          places = places_[name];
        if (places.empty()) {
            names_.push_back(name);
        }
        if (std::find(places.begin(), places.end(), tensor) == places.end()) {
            places.push_back(tensor);
        }
    }
}

std::vector<std::string> Weights::names() const { return names_; }

Status Weights::find(const FileWeight & weight, Places & out) const {
    const auto found = places_.find(weight.name);
    if (found == places_.end()) {
        return refused(weight, "the loaded model has no such tensor");
    }
    out = found->second;
    for (const ggml_tensor * place : out) {
        if (ggml_nbytes(place) != weight.size) {
            return refused(weight, "the loaded model has " + std::to_string(ggml_nbytes(place)) +
                                       " bytes of it, the file " + std::to_string(weight.size));
        }
        if (!is_plain(*place)) {
            return refused(weight, "it was not loaded so that it can be changed");
        }
    }
    return {};
}

Status Weights::check_type(const FileWeight & weight, const ggml_tensor & place, int type) const {
    if (type < 0 || type >= GGML_TYPE_COUNT) {
        return refused(weight, "no type has the number " + std::to_string(type));
    }
    const auto   to     = static_cast<ggml_type>(type);
    const auto * traits = ggml_get_type_traits(to);
    if (!is_float(to) && (!ggml_is_quantized(to) || traits->to_float == nullptr)) {
        return refused(weight, std::string("nothing is quantized to ") + ggml_type_name(to));
    }
    if (!is_float(place.type)) {
        return refused(weight, std::string("it is ") + ggml_type_name(place.type) +
                                   " already, and cannot hold what other types make of it");
    }
    if (place.ne[0] % ggml_blck_size(to) != 0) {
        return refused(weight, "its rows have " + std::to_string(place.ne[0]) +
                                   " values, no multiple of the " +
                                   std::to_string(ggml_blck_size(to)) + " of a block of " +
                                   ggml_type_name(to));
    }
    if (weight.importance == nullptr) {
        // ggml_quantize_chunk asserts (ggml.c)
        return ggml_quantize_requires_imatrix(to)
                   ? refused(weight,
                             std::string(ggml_type_name(to)) + " needs importance data for it")
                   : Status{};
    }
    const auto wanted = static_cast<size_t>(place.ne[0] * place.ne[2] * place.ne[3]);
    if (weight.n_importance != wanted) {
        return refused(weight, "there are " + std::to_string(weight.n_importance) +
                                   " values of importance, expected " + std::to_string(wanted));
    }
    return {};
}

// Every `every`-th row of each matrix, from the middle of the first group on; what the type makes
// of them goes to `out` in the weight's own type, unless that is NULL.
Status Weights::convert(const FileWeight & weight, const ggml_tensor & place, int type,
                        int64_t every, char * out, double & error) {
    const auto    to       = static_cast<ggml_type>(type);
    const int64_t n        = place.ne[0];
    const int64_t n_rows   = place.ne[1];
    const int64_t n_mat    = place.ne[2] * place.ne[3];
    const int64_t first    = std::min((every - 1) / 2, n_rows - 1);
    const int64_t sampled  = (n_rows - first + every - 1) / every;
    const int64_t per_task = std::max<int64_t>(1, kValuesATask / n);
    const int64_t tasks    = (sampled + per_task - 1) / per_task; // a matrix
    const size_t  row_size = ggml_row_size(place.type, n);
    const auto *  data     = static_cast<const char *>(weight.data);

    ggml_quantize_init(to);
    std::vector<double> errors(static_cast<size_t>(tasks * n_mat), 0.0);
    std::atomic<bool>   no_memory{false};
    threads_.run(errors.size(), [&](size_t task) {
        try {
            const int64_t mat   = static_cast<int64_t>(task) / tasks;
            const int64_t begin = static_cast<int64_t>(task) % tasks * per_task;
            const int64_t count = std::min(per_task, sampled - begin);
            const float * importance =
                weight.importance == nullptr ? nullptr : weight.importance + mat * n;
            std::vector<float> values(static_cast<size_t>(count * n));
            std::vector<char>  packed(ggml_row_size(to, n) * static_cast<size_t>(count));
            const auto         offset = [&](int64_t k) {
                return static_cast<size_t>(mat * n_rows + first + (begin + k) * every) * row_size;
            };
            for (int64_t k = 0; k < count; ++k) {
                to_float(place.type, data + offset(k), values.data() + k * n, n);
            }
            std::vector<float> made(values.size());
            if (is_float(to)) {
                from_float(to, values.data(), packed.data(), count * n);
                to_float(to, packed.data(), made.data(), count * n);
            } else {
                ggml_quantize_chunk(to, values.data(), packed.data(), 0, count, n, importance);
                ggml_get_type_traits(to)->to_float(packed.data(), made.data(), count * n);
            }
            double sum = 0.0;
            for (int64_t i = 0; i < count * n; ++i) {
                const double off  = static_cast<double>(values[static_cast<size_t>(i)]) -
                                    static_cast<double>(made[static_cast<size_t>(i)]);
                const double each = importance == nullptr ? 1.0 : importance[i % n];
                sum += each * off * off;
            }
            errors[task] = sum;
            for (int64_t k = 0; out != nullptr && k < count; ++k) {
                from_float(place.type, made.data() + k * n, out + offset(k), n);
            }
        } catch (const std::bad_alloc &) {
            no_memory = true;
        }
    });
    if (no_memory) {
        throw std::bad_alloc();
    }
    error = 0.0;
    for (const double each : errors) {
        error += each;
    }
    error *= static_cast<double>(n_rows) / static_cast<double>(sampled);
    if (!std::isfinite(error)) {
        Status status = Status::failed(Code::non_finite, weight.name + ": NaN or infinite values");
        status.weight = weight.name;
        return status;
    }
    return {};
}

Status Weights::quantize(const FileWeight & weight, int type, double & error) {
    return guarded("while quantizing a weight in place", [&]() -> Status {
        Places places;
        Status status = find(weight, places);
        if (status.ok()) {
            status = check_type(weight, *places.front(), type);
        }
        std::vector<char> made(weight.size);
        if (status.ok()) {
            status = convert(weight, *places.front(), type, 1, made.data(), error);
        }
        for (ggml_tensor * place : places) {
            if (status.ok()) {
                ggml_backend_tensor_set(place, made.data(), 0, made.size());
            }
        }
        return status;
    });
}

Status Weights::error_of(const FileWeight & weight, int type, int64_t every, double & error) {
    return guarded("while quantizing a weight", [&]() -> Status {
        Places places;
        Status status = find(weight, places);
        if (status.ok()) {
            status = check_type(weight, *places.front(), type);
        }
        if (status.ok() && every < 1) {
            status = refused(weight, "every must be 1 or more");
        }
        return status.ok() ? convert(weight, *places.front(), type, every, /*out=*/nullptr, error)
                           : status;
    });
}

Status Weights::put(const FileWeight & weight) {
    Places       places;
    const Status status = find(weight, places);
    for (ggml_tensor * place : places) {
        if (status.ok()) {
            ggml_backend_tensor_set(place, weight.data, 0, weight.size);
        }
    }
    return status;
}

Status Weights::holds(const FileWeight & weight, bool & same) {
    return guarded("while reading a weight", [&]() -> Status {
        Places       places;
        const Status status = find(weight, places);
        same                = status.ok();
        std::vector<char> bytes;
        for (const ggml_tensor * place : places) {
            if (!same) {
                break;
            }
            bytes.resize(weight.size);
            ggml_backend_tensor_get(place, bytes.data(), 0, bytes.size());
            same = std::memcmp(bytes.data(), weight.data, weight.size) == 0;
        }
        return status;
    });
}

} // namespace imatrix
