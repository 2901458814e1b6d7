// The weights of loaded models, changed in place: one becomes what a quantized file would hold of
// it, and then again what its own file holds.
#pragma once

#include "live.h"
#include "model.h"
#include "parallel.h"
#include "status.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

struct ggml_tensor;

namespace imatrix {

// A weight as its file holds it.
struct FileWeight {
    std::string   name;
    const void *  data         = nullptr;
    size_t        size         = 0;       // bytes of data
    const float * importance   = nullptr; // [matrices, values a row]; NULL: all values count alike
    size_t        n_importance = 0;       // values of it
};

class Weights : public Counted<Weights> {
public:
    // The models must have been loaded with ModelParams::changeable, and outlive this. `head` is
    // the model that holds the head, or NULL.
    Weights(const Model & model, const Model * head);

    void set_threads(size_t n) { threads_.set_threads(n); }

    std::vector<std::string> names() const;

    // Puts in place what the type makes of a weight, rounded to the weight's own type. `error`
    // becomes the sum over its values w, which become q, of importance * (w - q)^2. The bytes that
    // the type gives are those that llama_model_quantize writes (ggml_quantize_chunk, by rows).
    Status quantize(const FileWeight & weight, int type, double & error);

    // The error that quantize() would give, estimated from every `every`-th row of each matrix. It
    // changes nothing.
    Status error_of(const FileWeight & weight, int type, int64_t every, double & error);

    // Puts the file's own bytes in place.
    Status put(const FileWeight & weight);
    // Whether the bytes in place are these.
    Status holds(const FileWeight & weight, bool & same);

private:
    // A model may hold a weight twice, on two devices (a tied output).
    using Places = std::vector<ggml_tensor *>;

    void   add(const Model & model, const std::string & prefix);
    Status find(const FileWeight & weight, Places & out) const;
    Status check_type(const FileWeight & weight, const ggml_tensor & place, int type) const;
    Status convert(const FileWeight & weight, const ggml_tensor & place, int type, int64_t every,
                   char * out, double & error);

    std::unordered_map<std::string, Places> places_;
    std::vector<std::string>                names_; // in the models' order
    Parallel                                threads_;
};

} // namespace imatrix
