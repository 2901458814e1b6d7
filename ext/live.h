// How many native objects exist, so that a test can see that none is left behind.
#pragma once

#include <atomic>
#include <cstdint>

namespace imatrix {

// Derive from it to be counted: class Model : private Counted<Model>.
template <class T> class Counted {
public:
    static int64_t live() { return count().load(std::memory_order_relaxed); }

protected:
    Counted() { ++count(); }
    Counted(const Counted &) { ++count(); }
    Counted & operator=(const Counted &) = default;
    ~Counted() { --count(); }

private:
    static std::atomic<int64_t> & count() {
        static std::atomic<int64_t> value{0};
        return value;
    }
};

// The engine's contexts and models, which are freed through its C interface.
inline std::atomic<int64_t> g_live_contexts{0};
inline std::atomic<int64_t> g_live_models{0};

} // namespace imatrix
