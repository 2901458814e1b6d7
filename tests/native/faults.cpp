// File calls that fail, or end the process, on demand: at the system call itself, wherever it is
// made from (Python, NumPy's fwrite, the C library). For tests and benchmarks/robustness.py.
//
// A seccomp filter turns the calls into SIGSYS; its handler looks whether the file lies in the
// folder in question, counts, and then makes the call, fails it, or kills the process. Needs no
// rights. Programs that are started from here inherit the filter but not the handler: they would
// die of their first write.
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

// What is counted; the same numbers are in tests/helpers/faults.py.
enum Kind : unsigned {
    kOpen     = 1, // for writing
    kWrite    = 2,
    kSync     = 4,
    kRename   = 8,
    kUnlink   = 16,
    kChange   = 32, // its mode or its length
    kLock     = 64,
    kOpenRead = 128,
};

enum Action : int {
    kNothing = 0,
    kKill    = 1, // before the call
    kTear    = 2, // after half of what was to be written
    kFail    = 3, // this one
    kFailOn  = 4, // this one and all of these kinds that follow
};

// Shared with the process that looks on.
struct Tally {
    int64_t seen;
    uint8_t kinds[1 << 16]; // of each call, in order
};

constexpr long kPass = 0x696d6178; // as the sixth argument, which none of the calls has

char     g_folder[PATH_MAX];
size_t   g_length = 0;
Tally *  g_tally  = nullptr;
unsigned g_kinds  = 0;
long     g_number = 0;
int      g_action = kNothing;
int      g_errno  = 0;

long pass(long number, const long * a) {
    const long result = syscall(number, a[0], a[1], a[2], a[3], a[4], kPass);
    return result == -1 ? -errno : result;
}

bool inside(const char * path) {
    return path != nullptr && std::strncmp(path, g_folder, g_length) == 0 &&
           (path[g_length] == '/' || path[g_length] == '\0');
}

bool inside(long descriptor) {
    char link[64], path[PATH_MAX];
    std::snprintf(link, sizeof link, "/proc/self/fd/%ld", descriptor);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) {
        return false;
    }
    path[n] = '\0';
    return inside(path);
}

unsigned opened(const char * path, long flags) {
    if (!inside(path)) {
        return 0;
    }
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0 ? kOpen : kOpenRead;
}

// What kind of call on the folder's files this is; 0 for none.
unsigned kind_of(long number, const long * a) {
    const auto text = [&](int i) {
        return reinterpret_cast<const char *>(a[i]);
    };
    switch (number) {
#ifdef SYS_open
        case SYS_open:   return opened(text(0), a[1]);
        case SYS_rename: return inside(text(0)) ? kRename : 0;
        case SYS_unlink: return inside(text(0)) ? kUnlink : 0;
        case SYS_chmod:  return inside(text(0)) ? kChange : 0;
#endif
        case SYS_openat:    return opened(text(1), a[2]);
        case SYS_write:
        case SYS_writev:
        case SYS_pwrite64:  return inside(a[0]) ? kWrite : 0;
        case SYS_fsync:
        case SYS_fdatasync: return inside(a[0]) ? kSync : 0;
        case SYS_ftruncate:
        case SYS_fchmod:    return inside(a[0]) ? kChange : 0;
        case SYS_fchmodat:  return inside(text(1)) ? kChange : 0;
#ifdef SYS_renameat
        case SYS_renameat:
#endif
        case SYS_renameat2: return inside(text(1)) ? kRename : 0;
        case SYS_unlinkat:  return inside(text(1)) ? kUnlink : 0;
        case SYS_flock:     return inside(a[0]) ? kLock : 0;
        default:            return 0;
    }
}

long answer(long number, long * a) {
    const unsigned kind = kind_of(number, a);
    if (kind == 0) {
        return pass(number, a);
    }
    const int64_t at = __atomic_add_fetch(&g_tally->seen, 1, __ATOMIC_RELAXED);
    if (at <= static_cast<int64_t>(sizeof g_tally->kinds)) {
        g_tally->kinds[at - 1] = static_cast<uint8_t>(kind);
    }
    const bool now =
        (kind & g_kinds) != 0 && (at == g_number || (g_action == kFailOn && at > g_number));
    if (!now || g_action == kNothing) {
        return pass(number, a);
    }
    if (g_action == kFail || g_action == kFailOn) {
        return -g_errno;
    }
    if (g_action == kTear && (number == SYS_write || number == SYS_pwrite64)) {
        a[2] /= 2;
        pass(number, a);
    }
    kill(getpid(), SIGKILL);
    return 0; // not reached
}

void on_call(int, siginfo_t * info, void * context) {
    const int    kept = errno;
    ucontext_t * at   = static_cast<ucontext_t *>(context);
#if defined(__x86_64__)
    greg_t * r   = at->uc_mcontext.gregs;
    long     a[] = {static_cast<long>(r[REG_RDI]), static_cast<long>(r[REG_RSI]),
                    static_cast<long>(r[REG_RDX]), static_cast<long>(r[REG_R10]),
                    static_cast<long>(r[REG_R8])};
    r[REG_RAX]   = answer(info->si_syscall, a);
#elif defined(__aarch64__)
    auto * r = at->uc_mcontext.regs;
    long   a[5];
    for (int i = 0; i < 5; ++i) {
        a[i] = static_cast<long>(r[i]);
    }
    r[0] = static_cast<unsigned long long>(answer(info->si_syscall, a));
#endif
    errno = kept;
}

} // namespace

extern "C" {

// Watches the calls on files in `folder`, an absolute path without links. Once a process.
// 0, or an errno.
int faults_watch(const char * folder, void * tally) {
    if (std::strlen(folder) >= sizeof g_folder) {
        return ENAMETOOLONG;
    }
    std::strcpy(g_folder, folder);
    g_length = std::strlen(folder);
    g_tally  = static_cast<Tally *>(tally);

    struct sigaction action = {};
    action.sa_sigaction     = on_call;
    action.sa_flags         = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    if (sigaction(SIGSYS, &action, nullptr) != 0) {
        return errno;
    }
    const long calls[] = {
#ifdef SYS_open
        SYS_open,      SYS_rename, SYS_unlink,   SYS_chmod,
#endif
#ifdef SYS_renameat
        SYS_renameat,
#endif
        SYS_openat,    SYS_write,  SYS_writev,   SYS_pwrite64,  SYS_fsync,    SYS_fdatasync,
        SYS_ftruncate, SYS_fchmod, SYS_fchmodat, SYS_renameat2, SYS_unlinkat, SYS_flock,
    };
    constexpr unsigned n = sizeof calls / sizeof *calls;
    sock_filter        filter[n + 6];
    unsigned           i = 0;
    filter[i++]          = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args) + 5 * 8);
    filter[i++]          = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kPass, n + 1, 0);
    filter[i++]          = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr));
    for (unsigned k = 0; k < n; ++k) {
        filter[i++] = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(calls[k]),
                               static_cast<unsigned char>(n - k), 0);
    }
    filter[i++]        = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[i++]        = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    sock_fprog program = {static_cast<unsigned short>(i), filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) {
        return errno;
    }
    return 0;
}

// Does `action` at the call number `number` (from 1), if it is of one of these kinds.
void faults_arm(unsigned kinds, long number, int action, int error) {
    g_kinds  = kinds;
    g_number = number;
    g_action = action;
    g_errno  = error;
}

} // extern "C"
