#include "staged_rows.h"

#include <system_error>

namespace imatrix {

StagedRows::~StagedRows() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    changed_.notify_all();
    if (worker_.joinable()) {
        worker_.join();
    }
}

void StagedRows::set_threads(size_t n) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !pending(); });
    threads_.set_threads(n);
}

StagedRows::Job & StagedRows::next() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return submitted_ - done_ < jobs_.size(); });
    return jobs_[submitted_ % jobs_.size()];
}

void StagedRows::submit() {
    if (!worker_.joinable()) {
        try {
            worker_ = std::thread([this] { work(); });
        } catch (const std::system_error &) { // the system has no more threads
            add(jobs_[submitted_ % jobs_.size()]);
            return;
        }
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++submitted_;
    }
    changed_.notify_all();
}

void StagedRows::wait_for(size_t slot) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this, slot] {
        for (uint64_t k = done_; k != submitted_; ++k) {
            if (jobs_[k % jobs_.size()].slot == slot) {
                return false;
            }
        }
        return true;
    });
}

StagedRows::Bad StagedRows::settle() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !pending(); });
    const Bad found = bad_;
    bad_            = {};
    return found;
}

void StagedRows::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return ending_ || pending(); });
        if (!pending()) {
            return;
        }
        const Job & job = jobs_[done_ % jobs_.size()];
        lock.unlock();
        add(job);
        lock.lock();
        ++done_;
        changed_.notify_all();
    }
}

void StagedRows::add(const Job & job) {
    const NonFinite bad = add_rows(threads_, job.blocks, job.n);
    if (bad.channel < 0) {
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!bad_.found) {
        bad_ = {true, job.weight, job.slot, job.mats[bad.block], bad.channel};
    }
}

} // namespace imatrix
