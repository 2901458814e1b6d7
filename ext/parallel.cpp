#include "parallel.h"

#include <algorithm>
#include <system_error>

namespace imatrix {

Parallel::~Parallel() { stop(); }

void Parallel::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    wake_.notify_all();
    for (std::thread & other : others_) {
        other.join();
    }
    others_.clear();
    ending_ = false;
}

void Parallel::set_threads(size_t n) {
    n = std::max<size_t>(1, n);
    if (n != n_threads_) {
        stop();
        n_threads_ = n;
    }
}

void Parallel::start() {
    others_.reserve(n_threads_ - 1);
    try {
        while (others_.size() + 1 < n_threads_) {
            others_.emplace_back([this] { work(); });
        }
    } catch (const std::system_error &) { // the system has no more threads
        n_threads_ = others_.size() + 1;
    }
}

void Parallel::take_tasks() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (next_ < n_tasks_) {
        const size_t mine = next_++;
        const auto & task = *task_;
        lock.unlock();
        task(mine);
        lock.lock();
        if (--left_ == 0) {
            done_.notify_one();
        }
    }
}

void Parallel::work() {
    while (true) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [this] { return ending_ || next_ < n_tasks_; });
            if (ending_) {
                return;
            }
        }
        take_tasks();
    }
}

void Parallel::run(size_t n, const std::function<void(size_t)> & task) {
    if (n_threads_ > 1 && n > 1 && others_.empty()) {
        start();
    }
    if (others_.empty() || n <= 1) {
        for (size_t i = 0; i < n; ++i) {
            task(i);
        }
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        task_    = &task;
        n_tasks_ = n;
        next_    = 0;
        left_    = n;
    }
    wake_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    n_tasks_ = 0;
    next_    = 0;
}

} // namespace imatrix
