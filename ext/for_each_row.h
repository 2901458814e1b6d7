// Work on many rows by several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace imatrix {

// work(i) for every i below n, each by one thread alone, so that the number of threads changes no
// result. A thread that cannot be started leaves its share to be done here. `work` must not throw.
template <typename Work> void for_each_row(size_t n, int n_threads, const Work & work) {
    const size_t wanted = std::min(n, static_cast<size_t>(std::max(1, n_threads)));
    const auto   share  = [&](size_t thread) {
        for (size_t i = thread; i < n; i += wanted) {
            work(i);
        }
    };
    std::vector<std::thread> others;
    size_t                   started = 1;
    try {
        others.reserve(wanted);
        for (; started < wanted; ++started) {
            others.emplace_back(share, started);
        }
    } catch (const std::exception &) {}
    if (wanted > 0) {
        share(0);
    }
    for (size_t thread = started; thread < wanted; ++thread) {
        share(thread);
    }
    for (std::thread & other : others) {
        other.join();
    }
}

} // namespace imatrix
