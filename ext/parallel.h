// A few threads that wait for work between the engine's own steps: rows to add, logits to score.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace imatrix {

class Parallel {
public:
    Parallel() = default;
    ~Parallel();
    Parallel(const Parallel &)             = delete;
    Parallel & operator=(const Parallel &) = delete;

    // How many threads take part from now on, the caller's among them. Threads are started by
    // the first run() that has work for them; if the system gives none, fewer do the work.
    void   set_threads(size_t n);
    size_t threads() const { return n_threads_; }

    // Calls task(0) to task(n - 1), each once, on any thread, and returns when all are done.
    // `task` must not throw.
    void run(size_t n, const std::function<void(size_t)> & task);

private:
    void stop();
    void start();
    void work();
    void take_tasks();

    size_t                              n_threads_ = 1;
    std::vector<std::thread>            others_;
    std::mutex                          mutex_; // guards what follows
    std::condition_variable             wake_;
    std::condition_variable             done_;
    const std::function<void(size_t)> * task_    = nullptr;
    size_t                              n_tasks_ = 0;
    size_t                              next_    = 0; // the task nobody took yet
    size_t                              left_    = 0; // tasks that are not done yet
    bool                                ending_  = false;
};

} // namespace imatrix
