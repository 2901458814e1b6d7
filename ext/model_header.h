// Reads the header of a model file, metadata and tensor names, and loads nothing; model.h loads.
#pragma once

#include "status.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace imatrix {

struct FileTensor {
    std::string name;
    int         n_dims = 0;
    int64_t     ne[4]  = {1, 1, 1, 1};
};

// A tensor of whole numbers, which the engine takes for indices.
struct FileTable {
    std::string name;
    int64_t     offset = 0; // byte in the file
    int64_t     count  = 0; // of int32
};

struct ModelHeader {
    std::string             architecture;
    std::string             tokenizer;            // tokenizer.ggml.model, "" if there is none
    int64_t                 split_count   = 0;    // parts of a multi-part model, 0 or 1: one file
    int64_t                 split_no      = -1;   // which of them this is, from 0
    int64_t                 split_tensors = -1;   // of all parts together
    int64_t                 data_offset   = 0;    // bytes before the first tensor's data
    bool                    aligned       = true; // every tensor lies where the engine can map it
    std::vector<FileTensor> tensors;              // of this part
    std::vector<FileTable>  tables;               // of this part
    // the architecture's own whole-number keys, such as "attention.key_length"
    std::vector<std::pair<std::string, int64_t>> integers;
};

// Reads the header of a GGUF file with the engine's own reader and checks that the file is
// long enough for its tensors. bad_model says what is wrong with it.
Status read_model_header(const std::string & path, ModelHeader & out);

} // namespace imatrix
