#include "backend_modules.h"

#include "engine_log.h"

#include "ggml-backend.h"

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <system_error>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace imatrix {
namespace {

namespace fs = std::filesystem;

#ifdef _WIN32
constexpr const char * kPrefix = "ggml-";
constexpr const char * kSuffix = ".dll";
#else
constexpr const char * kPrefix = "libggml-";
constexpr const char * kSuffix = ".so"; // on macOS too (ggml-backend-reg.cpp)
#endif

// How the libraries that are linked are named (vendor/engine.cmake); modules keep the engine's
// names.
constexpr const char * kOurLibrary = "imatrix-ggml";

// --- what the system's loader is asked --------------------------------------

#ifdef _WIN32
fs::path file_of(const void * address) {
    HMODULE module = nullptr;
    if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS |
                                GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                            static_cast<LPCWSTR>(address), &module)) {
        return {};
    }
    std::wstring path(32768, L'\0'); // the longest that there is
    path.resize(GetModuleFileNameW(module, path.data(), static_cast<DWORD>(path.size())));
    return fs::path(path);
}

class Library {
public:
    explicit Library(const fs::path & path) {
        // no dialog about a missing library
        const UINT before = SetErrorMode(SEM_FAILCRITICALERRORS);
        SetErrorMode(before | SEM_FAILCRITICALERRORS);
        handle_ = LoadLibraryW(path.c_str());
        if (handle_ == nullptr) {
            const DWORD error = GetLastError();
            problem_          = std::system_category().message(static_cast<int>(error));
            if (error == ERROR_MOD_NOT_FOUND) {
                problem_ += " (a library that it needs is missing)";
            }
        }
        SetErrorMode(before);
    }
    ~Library() {
        if (handle_ != nullptr) {
            FreeLibrary(handle_);
        }
    }
    Library(const Library &)             = delete;
    Library & operator=(const Library &) = delete;

    const std::string & problem() const { return problem_; }
    void *              symbol(const char * name) const {
        return reinterpret_cast<void *>(GetProcAddress(handle_, name));
    }

private:
    HMODULE     handle_ = nullptr;
    std::string problem_;
};
#else
fs::path file_of(const void * address) {
    Dl_info info{};
    if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) {
        return {};
    }
    std::error_code error;
    fs::path        absolute = fs::absolute(info.dli_fname, error);
    return error ? fs::path(info.dli_fname) : absolute;
}

class Library {
public:
    explicit Library(const fs::path & path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) {
            const char * error = dlerror();
            problem_           = error == nullptr ? "it cannot be loaded" : error;
        }
    }
    ~Library() {
        if (handle_ != nullptr) {
            dlclose(handle_);
        }
    }
    Library(const Library &)             = delete;
    Library & operator=(const Library &) = delete;

    const std::string & problem() const { return problem_; }
    void *              symbol(const char * name) const { return dlsym(handle_, name); }

private:
    void *      handle_ = nullptr;
    std::string problem_;
};
#endif

template <class Function> const void * address_of(Function * function) {
    return reinterpret_cast<const void *>(function);
}

// --- the engine's folder -----------------------------------------------------

fs::path engine_folder() {
    return file_of(address_of(ggml_backend_load_all_from_path)).parent_path();
}

bool starts_with(const std::string & text, const std::string & start) {
    return text.compare(0, start.size(), start) == 0;
}

bool is_cpu(const std::string & file) { return starts_with(file, std::string(kPrefix) + "cpu"); }

std::vector<fs::path> module_files(const fs::path & folder) {
    std::vector<fs::path>  found;
    std::error_code        error;
    fs::directory_iterator entries(folder, error);
    for (; !error && entries != fs::directory_iterator(); entries.increment(error)) {
        const fs::path path = entries->path();
        if (path.extension() == kSuffix && starts_with(path.filename().u8string(), kPrefix)) {
            found.push_back(path);
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

// --- folders of other distributions --------------------------------------------

struct ModuleFolder {
    fs::path    path;
    std::string problem;
};

std::mutex                g_folders_mutex;
std::vector<ModuleFolder> g_folders;

std::vector<ModuleFolder> module_folders() {
    const std::lock_guard<std::mutex> lock(g_folders_mutex);
    return g_folders;
}

// "cuda" of libggml-cuda.so: what the backend calls itself, but for capitals.
std::string backend_of(const fs::path & module) {
    return module.stem().u8string().substr(std::string(kPrefix).size());
}

// Another copy of ggml whose symbols the whole process sees (dlopen with RTLD_GLOBAL) takes the
// place of ours: a module binds its calls to the first definition in the global scope, which is
// that copy's, of any version. Copies that keep to themselves are no trouble, as no two libraries
// of the process have one name (vendor/engine.cmake).
Status check_only_copy() {
    const fs::path ours    = file_of(address_of(ggml_backend_register));
    fs::path       foreign = ours;
    bool           is_ours = ours.filename().u8string().find(kOurLibrary) != std::string::npos;
#ifndef _WIN32
    const void * seen = dlsym(RTLD_DEFAULT, "ggml_backend_register");
    if (seen != nullptr && seen != address_of(ggml_backend_register)) {
        foreign = file_of(seen);
        is_ours = false;
    }
#endif
    if (is_ours) {
        return {};
    }
    return Status::failed(
        Code::engine_failed,
        "another copy of ggml, " + foreign.u8string() +
            ", was loaded for the whole process (RTLD_GLOBAL) and takes the place of imatrix's "
            "own. "
            "Load it without RTLD_GLOBAL (sys.setdlopenflags, ctypes' mode), or use imatrix in a "
            "process of its own");
}

bool has_cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) != nullptr; }

Status no_cpu() {
    size_t      n_variants = 0;
    std::string problem;
    for (const BackendModule & module : backend_modules()) {
        if (is_cpu(module.file)) {
            ++n_variants;
            if (problem.empty() && !module.problem.empty()) {
                problem = module.file + ": " + module.problem;
            }
        }
    }
    const std::string folder = engine_folder().u8string();
    std::string       what   = "the engine has no backend for the CPU: ";
    if (n_variants == 0) {
        what += folder + " holds no " + kPrefix + "cpu-*" + kSuffix;
    } else {
        what += "of " + std::to_string(n_variants) + " in " + folder + " none can be used here. " +
                problem;
    }
    return Status::failed(
        Code::engine_failed,
        what + ". Install the package again (pip install --force-reinstall imatrix), "
               "or build it for this machine, which takes a C++ compiler (pip "
               "install --no-binary imatrix imatrix)");
}

constexpr const char * kNotHere = "it does not run on this machine";

// Who brings a library of the system that a module may find missing.
struct Provider {
    const char * library;
    const char * who;
};
constexpr Provider kProviders[] = {
    {"libcuda.so.1", "NVIDIA's driver brings it; nvidia-smi shows whether it is installed"},
    {"nvcuda.dll", "NVIDIA's driver brings it"},
    {"libcudart", "the package nvidia-cuda-runtime brings it"},
    {"libcublas", "the package nvidia-cublas brings it"},
    {"libvulkan.so.1", "the Vulkan loader, of the same name, brings it"},
    {"libamdhip64", "ROCm brings it"},
};

std::string with_provider(const std::string & problem) {
    for (const Provider & provider : kProviders) {
        if (starts_with(problem, provider.library)) {
            return problem + " (" + provider.who + ")";
        }
    }
    return problem;
}

// What a module says of this machine: "" if it can be used.
std::string problem_of(const Library & library) {
    if (!library.problem().empty()) {
        return with_provider(library.problem());
    }
    // as ggml_backend_load_best reads it (ggml-backend-reg.cpp): 0 is "not here"
    const auto score = reinterpret_cast<int (*)()>(library.symbol("ggml_backend_score"));
    return score != nullptr && score() == 0 ? kNotHere : "";
}

void warn_of(const fs::path & module, const std::string & problem) {
    if (!problem.empty()) {
        log_line(GGML_LOG_LEVEL_WARN, "the backend " + module.filename().u8string() +
                                          " cannot be used here: " + problem);
    }
}

// One of another distribution's.
void load_other(const fs::path & module, const std::string & problem_of_folder) {
    if (ggml_backend_reg_by_name(backend_of(module).c_str()) != nullptr) {
        return; // built in, or in the engine's own folder
    }
    // opened here first, as the engine prints errors of its own
    const std::string problem =
        problem_of_folder.empty() ? problem_of(Library(module)) : problem_of_folder;
    if (problem.empty()) {
        ggml_backend_load(module.u8string().c_str());
    }
    warn_of(module, problem);
}

Status load() {
    // with linked backends too: nothing is taken from the interpreter's folder or the current one,
    // where ggml_backend_load_all() looks, and where another engine's modules may lie
    Status status = check_only_copy();
    if (!status.ok()) {
        return status;
    }
    ggml_backend_load_all_from_path(engine_folder().u8string().c_str());
    if (!has_cpu()) {
        return no_cpu();
    }
    for (const fs::path & path : module_files(engine_folder())) {
        if (!is_cpu(path.filename().u8string())) {
            warn_of(path, problem_of(Library(path)));
        }
    }
    for (const ModuleFolder & folder : module_folders()) {
        for (const fs::path & path : module_files(folder.path)) {
            load_other(path, folder.problem);
        }
    }
    return {};
}

} // namespace

void add_module_folder(const std::string & folder, const std::string & problem) {
    const std::lock_guard<std::mutex> lock(g_folders_mutex);
    g_folders.push_back({fs::u8path(folder), problem});
}

Status load_backends() {
    static std::once_flag once;
    static Status         status;
    std::call_once(once, [] { status = guarded("loading the engine's backends", load); });
    return status;
}

std::vector<BackendModule> backend_modules() {
    std::vector<BackendModule> found;
    for (const fs::path & path : module_files(engine_folder())) {
        found.push_back({path.filename().u8string(), problem_of(Library(path))});
    }
    for (const ModuleFolder & folder : module_folders()) {
        for (const fs::path & path : module_files(folder.path)) {
            const bool is_there = ggml_backend_reg_by_name(backend_of(path).c_str()) != nullptr;
            found.push_back({path.filename().u8string(), is_there ? ""
                                                         : folder.problem.empty()
                                                             ? problem_of(Library(path))
                                                             : folder.problem});
        }
    }
    // one variant is enough
    if (has_cpu()) {
        for (BackendModule & module : found) {
            if (is_cpu(module.file) && module.problem == kNotHere) {
                module.problem.clear();
            }
        }
    }
    return found;
}

std::string cpu_variant() {
    const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu == nullptr) {
        return "";
    }
    // a function of the backend's own: the registry does not say where a backend comes from
    const void * function   = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu),
                                                                "ggml_backend_set_n_threads");
    const std::string name  = file_of(function).stem().u8string();
    const std::string start = std::string(kPrefix) + "cpu-";
    return function != nullptr && starts_with(name, start) ? name.substr(start.size()) : "";
}

} // namespace imatrix
