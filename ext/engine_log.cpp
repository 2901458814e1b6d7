#include "engine_log.h"

#include "ggml.h"
#include "llama.h"

#include <atomic>
#include <mutex>

namespace imatrix {
namespace {

std::atomic<LogSink> g_sink{nullptr};
std::atomic<int>     g_level{GGML_LOG_LEVEL_WARN};
std::mutex           g_mutex; // guards what follows
std::string          g_line;  // text without its newline yet
int                  g_line_level = GGML_LOG_LEVEL_INFO;
std::string          g_first_error;

bool starts_with(const std::string & line, const char * start) { return line.rfind(start, 0) == 0; }

// These warnings are about what we do on purpose, on nearly every run, and become lines of the
// level INFO.
//  - our probe reserves graphs of other sizes than the context planned for, and the engine says
//    so when the context is freed (llama-context.cpp, ~llama_context);
//  - a trunk-only run leaves the head's tensors out (llama-model-loader.cpp);
//  - graphs are made anew for each batch once RPC servers are in use (engine_info.cpp).
bool is_expected(const std::string & line) {
    return (starts_with(line, "~llama_context:") &&
            line.find("does not match expectation") != std::string::npos) ||
           starts_with(line, "model has unused tensor") ||
           line.find("graph reuse disabled") != std::string::npos;
}

// The engine logs pieces of lines (level CONT continues the last one), from any thread.
void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    std::string line;
    int         line_level;
    {
        const std::lock_guard<std::mutex> lock(g_mutex);
        if (level != GGML_LOG_LEVEL_CONT) {
            g_line_level = level;
        }
        g_line += text;
        const size_t end = g_line.find_last_not_of("\r\n");
        if (!g_line.empty() && g_line.back() != '\n') {
            return;
        }
        g_line.resize(end == std::string::npos ? 0 : end + 1);
        line.swap(g_line);
        line_level = g_line_level == GGML_LOG_LEVEL_WARN && is_expected(line) ? GGML_LOG_LEVEL_INFO
                                                                              : g_line_level;
        if (line_level == GGML_LOG_LEVEL_ERROR && !line.empty() && g_first_error.empty()) {
            g_first_error = line;
        }
    }
    const LogSink sink = g_sink.load();
    // the level is checked here, so that a line that nobody wants never takes the GIL
    if (sink != nullptr && !line.empty() && line_level >= g_level.load()) {
        sink(line_level, line.c_str());
    }
}

} // namespace

void log_line(int level, const std::string & line) {
    const LogSink sink = g_sink.load();
    if (sink != nullptr && level >= g_level.load()) {
        sink(level, line.c_str());
    }
}

void set_log_sink(LogSink sink, int level) {
    g_level = level;
    g_sink  = sink;
    llama_log_set(on_log, nullptr);
}

std::string first_error() {
    const std::lock_guard<std::mutex> lock(g_mutex);
    return g_first_error;
}

void clear_error() {
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_first_error.clear();
}

Status engine_error(Code code, const std::string & what) {
    const std::string why = first_error();
    const auto        has = [&](const char * words) {
        return why.find(words) != std::string::npos;
    };
    const bool memory = has("allocate") || has("out of memory") || has("bad_alloc");
    return Status::failed(memory ? Code::out_of_memory : code,
                          why.empty() ? what : what + ": " + why);
}

} // namespace imatrix
