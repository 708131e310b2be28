/* Calls that change what is on the disk under a folder, counted; at a chosen one the process dies or the disk is full.

   Loaded by LD_PRELOAD, so that whatever writes is seen: Python, torch, safetensors. fault_arm() begins to count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, KILL_HALFWAY, FULL };

static char root[PATH_MAX];
static int action;
static long moment, count;

void fault_arm(const char *folder, int what, long when) {
    strncpy(root, folder, sizeof root - 1);
    action = what, moment = when, count = 0;
}

long fault_count(void) { return count; }

static int inside(const char *path) {
    char full[PATH_MAX];
    if (!root[0] || !path) return 0;
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here) || snprintf(full, sizeof full, "%s/%s", here, path) >= (int)sizeof full) return 0;
        path = full;
    }
    size_t n = strlen(root);
    return !strncmp(path, root, n) && (!path[n] || path[n] == '/');
}

static int open_inside(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

/* Whether the call fails; takes: it needs space. Does not come back where the process dies before the call. */
static int fault(int takes) {
    ++count;
    if (action == KILL && count == moment) kill(getpid(), SIGKILL), pause();
    if (action == FULL && count >= moment && takes) return errno = ENOSPC, 1;
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!open_inside(fd)) return real(fd, data, size);
    if (fault(1)) return -1;
    if (action == KILL_HALFWAY && count >= moment) real(fd, data, size / 2), kill(getpid(), SIGKILL), pause();
    return real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return open_inside(fd) && fault(1) ? -1 : real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    return open_inside(fd) && fault(1) ? -1 : real(fd, parts, n);
}

int fsync(int fd) { REAL(fsync); return open_inside(fd) && fault(0) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return open_inside(fd) && fault(0) ? -1 : real(fd, size); }
int rename(const char *a, const char *b) { REAL(rename); return inside(b) && fault(0) ? -1 : real(a, b); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return inside(path) && fault(1) ? -1 : real(path, mode); }
int unlink(const char *path) { REAL(unlink); return inside(path) && fault(0) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return inside(path) && fault(0) ? -1 : real(path); }
int symlink(const char *a, const char *b) { REAL(symlink); return inside(b) && fault(1) ? -1 : real(a, b); }
int chmod(const char *path, mode_t mode) { REAL(chmod); return inside(path) && fault(0) ? -1 : real(path, mode); }

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return open_inside(folder) && fault(0) ? -1 : real(folder, path, flags);
}

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        REAL(name);                                                             \
        va_list more;                                                           \
        va_start(more, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                           \
        if (flags & (O_CREAT | O_TRUNC) && inside(path) && fault(1)) return -1; \
        return real(path, flags, mode);                                         \
    }
OPEN(open)
OPEN(open64)
