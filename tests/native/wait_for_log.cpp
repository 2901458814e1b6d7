// Preloaded into the engine's programs by the tests (conftest.run_tool). They may end before the
// thread that writes their log has written all of it (common/log.cpp: the logger is never deleted,
// so that nobody waits for it). This one ends them when all other threads sleep.
#include <cstdio>
#include <cstring>
#include <string>

#include <dirent.h>
#include <unistd.h>

namespace {

// The state in /proc/self/task/TID/stat, behind the name in parentheses; 'S' for one that is gone.
char state_of(const char * tid) {
    const std::string path = std::string("/proc/self/task/") + tid + "/stat";
    FILE *            file = std::fopen(path.c_str(), "r");
    if (file == nullptr) {
        return 'S';
    }
    char         line[512] = {};
    const size_t n         = std::fread(line, 1, sizeof(line) - 1, file);
    std::fclose(file);
    line[n]            = 0;
    const char * after = std::strrchr(line, ')');
    return after != nullptr && after[1] == ' ' ? after[2] : 'S';
}

bool others_sleep() {
    DIR * tasks = opendir("/proc/self/task");
    if (tasks == nullptr) {
        return true;
    }
    const std::string self = std::to_string(getpid()); // exit() was called in the first thread
    bool              all  = true;
    while (const dirent * entry = readdir(tasks)) {
        const char * tid = entry->d_name;
        if (tid[0] != '.' && self != tid && state_of(tid) != 'S') {
            all = false;
        }
    }
    closedir(tasks);
    return all;
}

__attribute__((destructor)) void wait_for_log() {
    // asleep twice: between the two it may have waited for whoever reads the pipe
    for (int polls = 0, asleep = 0; polls < 2000 && asleep < 2; ++polls) {
        usleep(1000);
        asleep = others_sleep() ? asleep + 1 : 0;
    }
}

} // namespace
