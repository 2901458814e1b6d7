// The engine's log: one callback for the whole process, whole lines, filtered by level.
#pragma once

#include <string>

namespace imatrix {

// GGML_LOG_LEVEL_*: debug 1, info 2, warn 3, error 4 (ggml.h)
using LogSink = void (*)(int level, const char * line);

// Sends lines of at least `level` to `sink`; NULL drops all. Errors are remembered
// whatever the level. Safe to call at any time from any thread.
void set_log_sink(LogSink sink, int level);

// A line of our own, sent where the engine's lines go.
void log_line(int level, const std::string & line);

// The first error line since clear_error(), to enrich an exception; "" if none. The first one
// names the cause; those after it say who failed because of it ("failed to load model").
std::string first_error();
void        clear_error();

} // namespace imatrix
