// The engine's log: one callback for the whole process, whole lines, filtered by level. And what
// the engine gives as the cause of a failure, which it says there only.
#pragma once

#include "status.h"

#include <exception>
#include <new>
#include <string>
#include <utility>

namespace imatrix {

// GGML_LOG_LEVEL_*: debug 1, info 2, warn 3, error 4 (ggml.h)
using LogSink = void (*)(int level, const char * line);

// Sends lines of at least `level` to `sink`; NULL drops all. Errors are remembered
// whatever the level. It may be called at any time from any thread.
void set_log_sink(LogSink sink, int level);

// Sends a line of our own to where the engine's lines go.
void log_line(int level, const std::string & line);

// The first error line since clear_error(), "" if there is none. The first one names the cause;
// those after it say who failed because of it ("failed to load model").
std::string first_error();
void        clear_error();

// A failure of the engine: first_error() follows `what`, and if it is about memory the code is
// out_of_memory.
Status engine_error(Code code, const std::string & what);

// Runs `work`, which gives a Status; what it throws becomes one. `doing`: what memory ran out for.
template <class Work> Status guarded(const char * doing, Work && work) {
    try {
        return std::forward<Work>(work)();
    } catch (const std::bad_alloc &) {
        return Status::failed(Code::out_of_memory, std::string("out of memory ") + doing);
    } catch (const std::exception & error) {
        return engine_error(Code::engine_failed, error.what());
    }
}

} // namespace imatrix
