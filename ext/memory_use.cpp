#include "memory_use.h"

#include "contexts.h"

#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama.h"

namespace imatrix {

std::vector<MemoryUse> memory_use(const Contexts & contexts) {
    std::vector<MemoryUse>   uses;
    const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto               use = [&](ggml_backend_buffer_type_t type) -> MemoryUse & {
        // some of the host's types belong to no device
        const ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
        MemoryUse                found;
        found.host   = device == nullptr || device == cpu || ggml_backend_buft_is_host(type);
        found.device = ggml_backend_dev_name(found.host ? cpu : device);
        // other types on the host hold weights in an order of their own (ggml-cpu/repack.cpp)
        found.plain = type == ggml_backend_dev_buffer_type(cpu);
        for (MemoryUse & known : uses) {
            if (known.device == found.device && known.plain == found.plain) {
                return known;
            }
        }
        uses.push_back(found);
        return uses.back();
    };
    for (const bool head : {false, true}) {
        const llama_context * ctx = contexts.context(head);
        if (ctx == nullptr) {
            continue;
        }
        const bool own_model = !head || &contexts.model(true) != &contexts.model(false);
        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            MemoryUse & found = use(type);
            found.model += own_model ? static_cast<int64_t>(bytes.model) : 0;
            found.context += static_cast<int64_t>(bytes.context);
            found.compute += static_cast<int64_t>(bytes.compute);
        }
        // What the breakdown leaves out (llama-context.cpp, output_reserve): logits of the rows
        // that are asked for them, and the trunk's rows for the head.
        const llama_model * trunk = contexts.model(false).get();
        const int64_t       outputs =
            contexts.n_outputs(head) * static_cast<int64_t>(contexts.model(false).n_vocab());
        const int64_t hidden =
            contexts.params().n_batch * static_cast<int64_t>(llama_model_n_embd_out(trunk));
        use(ggml_backend_dev_buffer_type(cpu)).compute +=
            (outputs + hidden) * static_cast<int64_t>(sizeof(float));
    }
    return uses;
}

} // namespace imatrix
