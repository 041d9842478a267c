/* A file layer that fails on demand, loaded with LD_PRELOAD by tests/support/faults.py.
 *
 * It counts the calls that change what is on disk below one folder: opening for writing, write, truncate, fsync,
 * rename, unlink, mkdir, rmdir, chmod. At a chosen one the process is killed, before the call or in its middle, or asked
 * to stop, or the call fails. Armed at run time, in a forked process, so that one start of Python serves many trials.
 * The clock can be set to another time, for that process alone, and a file can be shown with the content of another, as
 * a host whose copy of it is another's sees it. What changes names, and what is synced, can be written
 * down in order: a line WHAT, path and, of a rename, new path, with tabs between them.
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FULL, BROKEN, STOP, UNSYNCED };  /* what to do at the chosen point */
enum { CREATES, WRITES, SYNCS, NAMES, REMOVES };      /* what a call does: a full disk refuses the first two alone */

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static char under[PATH_MAX];
static long chosen = -1, count;
static int mode;
static char ours[65536];                              /* by descriptor: open for writing below `under` */

void failing_files_arm(const char *folder, long at, int what) {
    strncpy(under, folder, sizeof under - 1);
    chosen = at, mode = what, count = 0;
}
long failing_files_count(void) { return count; }

/* The absolute path of what a call names, in `whole`, of 2 * PATH_MAX; NULL where it cannot be told. */
static const char *absolute(int dir, const char *path, char *whole) {
    char link[64];
    if (!path) return NULL;
    if (path[0] == '/') return path;
    if (dir == AT_FDCWD) { if (!getcwd(whole, PATH_MAX)) return NULL; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, whole, PATH_MAX - 1);
        if (n < 0) return NULL;
        whole[n] = 0;
    }
    if (path[0]) { strcat(whole, "/"); strncat(whole, path, PATH_MAX - 1); }
    return whole;
}
static int inside(int dir, const char *path) {
    char whole[2 * PATH_MAX];
    if (!under[0]) return 0;
    path = absolute(dir, path, whole);
    return path && !strncmp(path, under, strlen(under));
}

static int list = -1, last_written = -1;              /* descriptors: of the list, and of the write that is its last line */
void failing_files_list(const char *path) { list = REAL(open)(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644); }
static void note(const char *what, int dir, const char *path, const char *to) {
    char whole[2 * PATH_MAX], line[5 * PATH_MAX];
    if (list < 0 || !inside(dir, path)) return;
    int error = errno, n = snprintf(line, sizeof line, "%s\t%s\t%s\n", what, absolute(dir, path, whole), to);
    REAL(write)(list, line, n);
    errno = error, last_written = -1;
}

/* Whether the call must fail; errno says how. A torn write is the caller's: it gets -2. */
static int point(int kind) {
    long now = count++;
    if (chosen < 0 || now < chosen) return 0;
    if (mode == UNSYNCED) { if (kind != SYNCS) return 0; errno = EIO; return -1; }
    if (mode == FULL) { if (kind > WRITES) return 0; errno = ENOSPC; return -1; }
    if (now > chosen) return 0;
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == STOP) kill(getpid(), SIGTERM);
    if (mode == TORN) return -2;
    if (mode == BROKEN) { errno = EIO; return -1; }
    return 0;
}
static void die_if(int torn) { if (torn == -2) kill(getpid(), SIGKILL); }

#define AROUND(kind, is_ours, call)                                     \
    do {                                                                \
        int fails = (is_ours) ? point(kind) : 0;                        \
        if (fails == -1) return -1;                                     \
        typeof(call) result = (call);                                   \
        die_if(fails);                                                  \
        return result;                                                  \
    } while (0)

static char hidden[PATH_MAX], shown[PATH_MAX];
void failing_files_show(const char *path, const char *other) {
    strncpy(hidden, path, sizeof hidden - 1);
    strncpy(shown, other, sizeof shown - 1);
}
/* What is opened for a path: itself, or what is shown in its place. Links on the way are followed. */
static const char *seen(int dir, const char *path) {
    char whole[2 * PATH_MAX], real[PATH_MAX];
    const char *name = hidden[0] ? absolute(dir, path, whole) : NULL;
    return name && realpath(name, real) && !strcmp(real, hidden) ? shown : path;
}

static int opened(int fd, int is_ours) {
    if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = is_ours;
    return fd;
}
static int writes(int flags) { return (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY; }

#define MODE_ARGUMENT(flags, bits)                                      \
    mode_t bits = 0;                                                    \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); bits = va_arg(list, int); va_end(list); }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        MODE_ARGUMENT(flags, bits)                                      \
        int mine = writes(flags) && inside(AT_FDCWD, path);             \
        if (mine) note("open", AT_FDCWD, path, "");                     \
        AROUND(CREATES, mine, opened(REAL(name)(writes(flags) ? path : seen(AT_FDCWD, path), flags, bits), mine)); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                    \
    int name(int dir, const char *path, int flags, ...) {               \
        MODE_ARGUMENT(flags, bits)                                      \
        int mine = writes(flags) && inside(dir, path);                  \
        if (mine) note("open", dir, path, "");                          \
        AROUND(CREATES, mine, opened(REAL(name)(dir, writes(flags) ? path : seen(dir, path), flags, bits), mine)); \
    }
OPENAT(openat)
OPENAT(openat64)

static int is_ours(int fd) { return under[0] && fd >= 0 && fd < (int)sizeof ours && ours[fd]; }

int close(int fd) { opened(fd, 0); return REAL(close)(fd); }
ssize_t write(int fd, const void *bytes, size_t n) {
    if (list >= 0 && fd != last_written && is_ours(fd)) { note("write", fd, "", ""); last_written = fd; }
    int fails = is_ours(fd) ? point(WRITES) : 0;
    if (fails == -1) return -1;
    ssize_t result = REAL(write)(fd, bytes, fails == -2 ? n / 2 : n);
    die_if(fails);
    return result;
}
ssize_t sendfile(int to, int from, off_t *offset, size_t n) { AROUND(WRITES, is_ours(to), REAL(sendfile)(to, from, offset, n)); }
ssize_t sendfile64(int to, int from, off64_t *offset, size_t n) { AROUND(WRITES, is_ours(to), REAL(sendfile64)(to, from, offset, n)); }
int ftruncate(int fd, off_t n) { AROUND(WRITES, is_ours(fd), REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { AROUND(WRITES, is_ours(fd), REAL(ftruncate64)(fd, n)); }

int fsync(int fd) { note("sync", fd, "", ""); AROUND(SYNCS, inside(fd, ""), REAL(fsync)(fd)); }
int rename(const char *a, const char *b) { note("rename", AT_FDCWD, a, b); AROUND(NAMES, inside(AT_FDCWD, a), REAL(rename)(a, b)); }
int renameat(int d, const char *a, int e, const char *b) { note("rename", d, a, b); AROUND(NAMES, inside(d, a), REAL(renameat)(d, a, e, b)); }
int unlink(const char *path) { note("gone", AT_FDCWD, path, ""); AROUND(REMOVES, inside(AT_FDCWD, path), REAL(unlink)(path)); }
int unlinkat(int dir, const char *path, int flags) { note("gone", dir, path, ""); AROUND(REMOVES, inside(dir, path), REAL(unlinkat)(dir, path, flags)); }
int rmdir(const char *path) { note("gone", AT_FDCWD, path, ""); AROUND(REMOVES, inside(AT_FDCWD, path), REAL(rmdir)(path)); }
int mkdir(const char *path, mode_t bits) { note("made", AT_FDCWD, path, ""); AROUND(CREATES, inside(AT_FDCWD, path), REAL(mkdir)(path, bits)); }
int chmod(const char *path, mode_t bits) { AROUND(NAMES, inside(AT_FDCWD, path), REAL(chmod)(path, bits)); }

static long clock_shift;                              /* seconds added to the time of day */
void failing_files_set_clock(long seconds) { clock_shift = seconds; }
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = REAL(clock_gettime);
    int result = real(id, now);
    if (!result && id == CLOCK_REALTIME) now->tv_sec += clock_shift;
    return result;
}
