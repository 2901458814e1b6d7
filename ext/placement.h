// On which devices a model's tensors lie: llama.cpp's -sm, -ts, -mg, -dev and -ot.
#pragma once

#include "status.h"

#include "llama.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace imatrix {

struct Placement {
    std::string              split_mode = "layer"; // "none", "layer", "row" or "tensor"
    std::vector<float>       tensor_split;         // shares of the devices; empty: by free memory
    int32_t                  main_gpu       = 0;   // of split_mode "none": which; negative: the CPU
    bool                     chosen_devices = false;
    std::vector<std::string> devices; // by name, if chosen_devices is set; empty: the CPU
    // A regular expression that finds a tensor's name, and the name of a buffer type; the first
    // one that finds it counts.
    std::vector<std::pair<std::string, std::string>> overrides;
};

// A placement in the engine's terms. It must live until the model is loaded.
class EnginePlacement {
public:
    // bad_argument if this machine or build does not have something, with what it has. `model` is
    // the file: the engine tells from it which devices it takes if none are chosen.
    Status set(const Placement & placement, const std::string & model, llama_model_params & params);

private:
    Status set_devices(const Placement & placement);
    Status set_split(const Placement & placement, const std::string & model,
                     const llama_model_params & params);
    Status set_overrides(const Placement & placement);

    std::vector<ggml_backend_dev_t>               devices_; // ends with NULL
    std::vector<float>                            split_;
    std::vector<llama_model_tensor_buft_override> overrides_; // ends with NULLs
};

// The first of `names` that a pattern finds as the engine looks for it (std::regex_search,
// ECMAScript); -1 for none. bad_argument if it is no regular expression.
Status find_name(const std::string & pattern, const std::vector<std::string> & names,
                 int64_t & found);

} // namespace imatrix
