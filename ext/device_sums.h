// Sums of squares, and of the rows themselves, made on the device that holds the rows, with ggml's
// own operations: only the sums come to the host, once a chunk.
//
// Squares are added by halves (the first half of the rows to the second, and so on), with ADD
// alone: float32 throughout, and the error of a sum of n squares grows with log2(n). A matrix
// multiplication with ones or with a routing matrix would be shorter, but CUDA runs those of
// float32 in TF32, 10 bits, whatever their precision flag says (ggml-cuda/common.cuh, the math
// mode of the cuBLAS handle), and one NaN would reach every expert as NaN * 0.
#pragma once

#include "sums.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

struct ggml_tensor;

namespace imatrix {

class DeviceSums {
public:
    enum class Outcome {
        added,
        unsupported, // by this device: nothing happened
        failed,      // the device did; what it held of this chunk is lost
    };

    DeviceSums();
    ~DeviceSums();
    DeviceSums(const DeviceSums &)             = delete;
    DeviceSums & operator=(const DeviceSums &) = delete;

    // Whether the host must copy a tensor to read it.
    static bool is_far(const ggml_tensor * tensor);

    void begin_chunk(); // what was not fetched is forgotten

    // Adds the squares of `rows`, which lie in a device's memory, to a slot's sums there, and with
    // `both` the rows to its signed sums; within a chunk it is the same for all of a slot. The rows
    // are read before this returns. `weight` comes back from fetch().
    //
    // Matrix m of the slot gets every row whose last two dimensions count to m; with one matrix
    // it gets all.
    Outcome add(const ggml_tensor * rows, size_t weight, size_t slot, const Shape & shape,
                bool both);
    // Matrix m gets the rows numbered rows_of[m], counted with dimension 1 fastest.
    Outcome add_routed(const ggml_tensor * rows, size_t weight, size_t slot, const Shape & shape,
                       const std::vector<std::vector<int32_t>> & rows_of, bool both);

    // A strided view of int32 without what lies between its rows, [ne1, ne0]. False if the device
    // cannot.
    bool fetch_ids(const ggml_tensor * ids, std::vector<int32_t> & out);

    // Gives what the devices hold of this chunk, slot by slot, [n_mat, width], and forgets it.
    // width is n_in, or 2 * n_in: the signed sums of a matrix behind those of its squares. Returns
    // the bytes that were copied.
    using Take = std::function<void(size_t weight, size_t slot, const float * sums, int64_t width)>;
    int64_t fetch(const Take & take);

private:
    struct Device;
    struct Graph;
    Device * device_of(const ggml_tensor * tensor);
    Outcome  run(Device & device, Graph & graph, ggml_tensor * sums, size_t weight, size_t slot,
                 const Shape & shape);

    std::vector<std::unique_ptr<Device>> devices_;
    std::vector<char>                    graph_memory_;
};

} // namespace imatrix
