// What native calls answer: a code and the words for a person. Nothing here throws.
#pragma once

#include <cstdint>
#include <string>

namespace imatrix {

enum class Code {
    ok = 0,
    bad_argument,
    bad_model, // the file, or what its metadata says
    out_of_memory,
    engine_failed, // the engine returned an error
    non_finite,    // NaN or Inf reached a weight
    rows_missing,  // a weight did not see the rows it should have
    cancelled,
};

struct Status {
    Code        code = Code::ok;
    std::string message;
    std::string weight;       // for non_finite and rows_missing
    int64_t     mat     = -1; // matrix or expert, -1 if it has no meaning
    int64_t     channel = -1;

    bool ok() const { return code == Code::ok; }

    static Status failed(Code code, std::string message) {
        Status status;
        status.code    = code;
        status.message = std::move(message);
        return status;
    }
};

} // namespace imatrix
