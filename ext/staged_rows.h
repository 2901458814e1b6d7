// Rows that were copied from a device's memory, added by a worker thread while the device goes on:
// there are two buffers, and one is filled while the worker adds what is in the other.
#pragma once

#include "add_rows.h"
#include "parallel.h"

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace imatrix {

class StagedRows {
public:
    struct Job {
        std::vector<char>          bytes;  // of the activation
        std::vector<const float *> rows;   // into it
        std::vector<RowBlock>      blocks; // of those rows, and where their sums are
        std::vector<int64_t>       mats;   // matrix or expert of each block
        size_t                     weight = 0;
        size_t                     slot   = 0;
        size_t                     n      = 0; // elements a row
    };
    struct Bad { // the first value that was not finite
        bool    found   = false;
        size_t  weight  = 0;
        size_t  slot    = 0;
        int64_t mat     = -1;
        int64_t channel = -1;
    };

    StagedRows() = default;
    ~StagedRows();
    StagedRows(const StagedRows &)             = delete;
    StagedRows & operator=(const StagedRows &) = delete;

    // Threads that a job is added with; between two jobs only.
    void set_threads(size_t n);

    // A buffer to fill. Waits until one of the two is free.
    Job & next();
    // Hands over the buffer that next() gave last.
    void submit();
    // Waits until nothing is on its way to a slot; the sums may then be touched by others.
    void wait_for(size_t slot);
    // Waits until nothing is on its way at all, and gives what was found since the last time.
    Bad settle();

private:
    void work();
    void add(const Job & job);
    bool pending() const { return submitted_ != done_; }

    std::array<Job, 2>      jobs_;
    Parallel                threads_; // the worker's
    std::thread             worker_;
    std::mutex              mutex_;
    std::condition_variable changed_;
    uint64_t                submitted_ = 0; // jobs; job k has buffer k % 2
    uint64_t                done_      = 0;
    bool                    ending_    = false;
    Bad                     bad_;
};

} // namespace imatrix
