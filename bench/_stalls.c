/*
 * Preloaded into the daemon: writes down each time that its event loop did not come back to
 * epoll_pwait for STALLS_LIMIT_US, as a line of the file STALLS_FILE:
 *
 *     begin (us since 1970), wall us, CPU us, times it waited, times it was preempted, page faults
 *
 * A stall of the daemon's own making has CPU time like wall time, or has waited (for the disk); one
 * that was preempted is the machine's. With STALLS_SIGNAL the thread gets that signal once it has
 * worked for so long, so that faulthandler shows what it is at. A turn of the loop costs 0.5 us more.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef int (*wait_function)(int, struct epoll_event *, int, int, const sigset_t *);

struct moment {
    long wall_us, cpu_us, waits, preempted, faults;
};

static wait_function real_wait;
static int out = -1, signal_number;
static long limit_us;
static pid_t watched; /* the thread that waits first is the loop's */
static timer_t timer;
static struct moment began;

static struct moment now(void) {
    struct timespec wall;
    struct rusage use;
    clock_gettime(CLOCK_REALTIME, &wall);
    getrusage(RUSAGE_THREAD, &use);
    return (struct moment){
        wall.tv_sec * 1000000L + wall.tv_nsec / 1000,
        (use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000L + use.ru_utime.tv_usec
            + use.ru_stime.tv_usec,
        use.ru_nvcsw, use.ru_nivcsw, use.ru_minflt + use.ru_majflt,
    };
}

static void arm(long us) {
    struct itimerspec span = {{0, 0}, {us / 1000000, us % 1000000 * 1000}};
    if (signal_number)
        timer_settime(timer, 0, &span, NULL);
}

static void start(void) {
    const char *file = getenv("STALLS_FILE"), *limit = getenv("STALLS_LIMIT_US");
    const char *number = getenv("STALLS_SIGNAL");
    real_wait = (wait_function)dlsym(RTLD_NEXT, "epoll_pwait");
    watched = gettid();
    limit_us = limit ? atol(limit) : 5000;
    if (file)
        out = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (number) {
        struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID};
        event.sigev_signo = signal_number = atoi(number);
        event._sigev_un._tid = watched;
        if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer))
            signal_number = 0;
    }
}

static void tell(struct moment end) {
    char line[160];
    int size = snprintf(line, sizeof line, "%ld %ld %ld %ld %ld %ld\n", began.wall_us,
                        end.wall_us - began.wall_us, end.cpu_us - began.cpu_us,
                        end.waits - began.waits, end.preempted - began.preempted,
                        end.faults - began.faults);
    if (write(out, line, size) < 0)
        out = -1;
}

int epoll_pwait(int epoll, struct epoll_event *events, int most, int wait_ms, const sigset_t *mask) {
    if (!real_wait)
        start();
    if (gettid() != watched || out < 0)
        return real_wait(epoll, events, most, wait_ms, mask);
    arm(0);
    if (began.wall_us) {
        struct moment end = now();
        if (end.wall_us - began.wall_us >= limit_us)
            tell(end);
    }
    int ready = real_wait(epoll, events, most, wait_ms, mask);
    began = now();
    arm(limit_us);
    return ready;
}
