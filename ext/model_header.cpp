#include "model_header.h"

#include "engine_log.h"

#include "ggml.h"
#include "gguf.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>

namespace imatrix {
namespace {

struct GgufFree {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};
struct GgmlFree {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }
};

std::string text_value(const gguf_context * gguf, const std::string & key) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_STRING) {
        return {};
    }
    return gguf_get_val_str(gguf, id);
}

// Empty if the value is no whole number.
std::optional<int64_t> integer_at(const gguf_context * gguf, int64_t id) {
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8:  return gguf_get_val_u8(gguf, id);
        case GGUF_TYPE_UINT16: return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_INT32:  return gguf_get_val_i32(gguf, id);
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_INT64:  return gguf_get_val_i64(gguf, id);
        case GGUF_TYPE_UINT64: return static_cast<int64_t>(gguf_get_val_u64(gguf, id));
        default:               return std::nullopt;
    }
}

int64_t integer_value(const gguf_context * gguf, const std::string & key, int64_t absent = 0) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    return id < 0 ? absent : integer_at(gguf, id).value_or(absent);
}

// TENSOR_ALIGNMENT in ggml/src/ggml-impl.h: a buffer over a mapped file must begin there, or the
// process ends (ggml_backend_cpu_buffer_from_ptr in ggml/src/ggml-backend.cpp).
constexpr uint64_t kMappable = 32;

} // namespace

Status read_model_header(const std::string & path, ModelHeader & out) {
    clear_error();
    ggml_context *                                shapes = nullptr;
    const gguf_init_params                        params{/*.no_alloc =*/true, /*.ctx =*/&shapes};
    const std::unique_ptr<gguf_context, GgufFree> gguf(gguf_init_from_file(path.c_str(), params));
    const std::unique_ptr<ggml_context, GgmlFree> owned(shapes);
    if (gguf == nullptr) {
        const std::string why = first_error();
        return Status::failed(Code::bad_model,
                              "not a readable GGUF file" + (why.empty() ? "" : " (" + why + ")"));
    }

    std::error_code error;
    const uint64_t  size = std::filesystem::file_size(std::filesystem::u8path(path), error);
    if (error) {
        return Status::failed(Code::bad_model, error.message());
    }
    // names end at a zero byte here as in the engine, which looks things up by name
    std::set<std::string> names;
    for (int64_t id = 0; id < gguf_get_n_kv(gguf.get()); ++id) {
        const std::string key = gguf_get_key(gguf.get(), id);
        if (key.empty() || !names.insert(key).second) {
            return Status::failed(Code::bad_model,
                                  key.empty() ? "damaged: a metadata key without a name"
                                              : "damaged: the key " + key + " is there twice");
        }
    }
    names.clear();
    const size_t data = gguf_get_data_offset(gguf.get());
    out.data_offset   = static_cast<int64_t>(data);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
        const char *        name   = gguf_get_tensor_name(gguf.get(), i);
        const ggml_tensor * tensor = ggml_get_tensor(shapes, name);
        if (name[0] == '\0' || !names.insert(name).second) {
            return Status::failed(Code::bad_model, name[0] == '\0'
                                                       ? "damaged: a tensor without a name"
                                                       : "damaged: the tensor " +
                                                             std::string(name) + " is there twice");
        }
        const uint64_t start = data + gguf_get_tensor_offset(gguf.get(), i);
        const uint64_t bytes = ggml_nbytes(tensor);
        if (bytes == 0) {
            return Status::failed(Code::bad_model,
                                  "damaged: the tensor " + std::string(name) + " has no values");
        }
        // by differences: a sum may go beyond 64 bits
        if (start > size || bytes > size - start) {
            return Status::failed(Code::bad_model, "truncated: tensor " + std::string(name) +
                                                       " takes " + std::to_string(bytes) +
                                                       " bytes from byte " + std::to_string(start) +
                                                       ", the file has " + std::to_string(size));
        }
        out.aligned &= start % kMappable == 0;
        if (tensor->type == GGML_TYPE_I32) {
            out.tables.push_back({name, static_cast<int64_t>(start), ggml_nelements(tensor)});
        }
        FileTensor entry;
        entry.name   = name;
        entry.n_dims = ggml_n_dims(tensor);
        for (int d = 0; d < 4; ++d) {
            entry.ne[d] = tensor->ne[d];
        }
        out.tensors.push_back(std::move(entry));
    }
    out.architecture         = text_value(gguf.get(), "general.architecture");
    out.tokenizer            = text_value(gguf.get(), "tokenizer.ggml.model");
    out.split_count          = integer_value(gguf.get(), "split.count");
    out.split_no             = integer_value(gguf.get(), "split.no", -1);
    out.split_tensors        = integer_value(gguf.get(), "split.tensors.count", -1);
    const std::string prefix = out.architecture + ".";
    for (int64_t id = 0; id < gguf_get_n_kv(gguf.get()); ++id) {
        const std::string            key   = gguf_get_key(gguf.get(), id);
        const std::optional<int64_t> value = integer_at(gguf.get(), id);
        if (key.compare(0, prefix.size(), prefix) == 0 && value.has_value()) {
            out.integers.emplace_back(key.substr(prefix.size()), *value);
        }
    }
    return {};
}

} // namespace imatrix
