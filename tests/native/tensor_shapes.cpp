#include "tensor_shapes.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <memory>
#include <set>
#include <stdexcept>

namespace imatrix::testing {
namespace {

struct FreeGguf {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};
struct FreeModel {
    void operator()(llama_model * model) const { llama_model_free(model); }
};

struct Found {
    std::vector<TensorShape> tensors;
    std::set<std::string>    names;
};

// The engine asks for the data of each tensor it made; a tied output comes a second time.
void on_tensor(ggml_tensor * tensor, void * user_data) {
    auto & found = *static_cast<Found *>(user_data);
    if (!found.names.insert(tensor->name).second) {
        return;
    }
    TensorShape shape;
    shape.name = tensor->name;
    shape.ne.assign(tensor->ne, tensor->ne + ggml_n_dims(tensor));
    shape.type = ggml_type_name(tensor->type);
    found.tensors.push_back(std::move(shape));
}

void on_log(ggml_log_level level, const char * text, void * user_data) {
    if (level >= GGML_LOG_LEVEL_WARN) { // CONT is the highest
        *static_cast<std::string *>(user_data) += text;
    }
}

} // namespace

std::vector<TensorShape> tensor_shapes(const std::string & path) {
    std::string       log;
    ggml_log_callback before      = nullptr;
    void *            before_data = nullptr;
    llama_log_get(&before, &before_data);
    llama_log_set(on_log, &log);

    ggml_backend_load_all();
    Found                                         found;
    std::unique_ptr<llama_model, FreeModel>       model;
    const std::unique_ptr<gguf_context, FreeGguf> keys(
        gguf_init_from_file(path.c_str(), {/*.no_alloc =*/true, /*.ctx =*/nullptr}));
    if (keys != nullptr) {
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers       = 0;
        params.load_mtp           = true;
        model.reset(llama_model_init_from_user(keys.get(), on_tensor, &found, params));
    }
    const bool failed = model == nullptr;
    model.reset();
    llama_log_set(before, before_data);
    if (failed) {
        throw std::runtime_error(path + ": " + log);
    }
    return found.tensors;
}

} // namespace imatrix::testing
