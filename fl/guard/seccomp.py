"""Which system calls a sandboxed script may make: an allow-list, as BPF for seccomp(2), by libseccomp.

Two filters, because one must let the interpreter be executed once:

- `launch_filter` is the allow-list. bubblewrap loads it just before it executes the interpreter. What is not named in
  it fails with ENOSYS ("this kernel has no such call"), so that libraries take their fallbacks; what is known to be a
  way out, and tempting, fails with EPERM. Calls by another architecture's numbers (x32, 32-bit) kill the process.
- `script_filter` is loaded by the bootstrap just before the script runs, on top: no program is executed any more, and
  what the bootstrap set up (limits, filters, dumpability) stays.

Decisions that are not obvious: clone3 fails with ENOSYS because its flags are in memory, where a filter cannot see
them; glibc then uses clone, whose namespace flags are filtered. memfd_create stays: updates leave the sandbox as sealed
memory files; what is in one cannot be executed (no execve, no execveat) and counts as the sandbox's memory. UNIX
sockets stay: torch's data loaders pass tensors by them; the network namespace and the mounts leave nothing outside to
connect to. AF_VSOCK goes with all other families: it is not in the network namespace and leads to the hypervisor.
inotify and fanotify go: they would tell what the host does with the folders that are shown read-only.
"""

from __future__ import annotations

import errno
from typing import Final

from fl.guard.libseccomp import ALLOW, Filter, equals, error, has_none_of, is_not

_FILES: Final = """
    access close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate fchdir
    chdir fchmod fchmodat fchmodat2 chmod fchown fchownat chown lchown fdatasync fsync sync_file_range fcntl flock
    fstat fstatfs statfs ftruncate truncate futimesat utime utimes utimensat getcwd getdents getdents64 link linkat
    lseek lstat mkdir mkdirat newfstatat stat statx open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv rename renameat renameat2 rmdir sendfile symlink
    symlinkat umask unlink unlinkat write writev fgetxattr flistxattr getxattr lgetxattr listxattr llistxattr
    memfd_create
"""
_WAITING: Final = """
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 pause poll ppoll pselect6
    select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_settime
"""
_MEMORY: Final = """
    brk madvise membarrier mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall munmap
    get_mempolicy set_robust_list get_robust_list futex futex_wait futex_wake futex_requeue futex_waitv rseq
    pkey_alloc pkey_free pkey_mprotect map_shadow_stack
"""
_PROCESSES: Final = """
    arch_prctl capget execve execveat exit exit_group fork vfork getcpu getegid geteuid getgid getgroups getpgid getpgrp
    getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid pidfd_open prlimit64
    restart_syscall sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval sched_setaffinity sched_yield seccomp set_tid_address setpgid setrlimit
    setsid sysinfo times uname wait4 waitid getrandom
"""
_SIGNALS: Final = """
    kill rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sigaltstack tgkill tkill pidfd_send_signal
"""
_TIME: Final = """
    alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime
"""
_SOCKETS: Final = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto shutdown
"""
ALLOWED: Final = frozenset(" ".join((_FILES, _WAITING, _MEMORY, _PROCESSES, _SIGNALS, _TIME, _SOCKETS)).split())
"""Calls that are allowed with any arguments by the launch filter."""

_FORBIDDEN: Final = """
    io_uring_setup io_uring_enter io_uring_register
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp
    keyctl add_key request_key
    mount umount umount2 mount_setattr move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick pivot_root
    chroot swapon swapoff quotactl quotactl_fd statmount listmount
    unshare setns
    bpf perf_event_open userfaultfd memfd_secret
    kexec_load kexec_file_load reboot init_module finit_module delete_module create_module
    open_by_handle_at name_to_handle_at fanotify_init fanotify_mark inotify_init inotify_init1 inotify_add_watch
    personality modify_ldt ioperm iopl vm86 vm86old
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
    mknod mknodat acct syslog vhangup
    sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex
    sched_setscheduler sched_setattr sched_setparam setpriority ioprio_set
    mbind migrate_pages move_pages set_mempolicy
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    splice tee vmsplice lookup_dcookie uselib ustat sysfs nfsservctl
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
FORBIDDEN: Final = frozenset(_FORBIDDEN.split())
"""Calls that fail with EPERM, whatever their arguments."""

CLONE_NAMESPACES: Final = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET. (NEWTIME is not clone's: there its bit is part of
the exit signal.)"""

AF_UNIX: Final = 1
SOL_SOCKET: Final = 1
SOCKET_OPTIONS: Final = (2, 7, 8, 9, 16, 20, 21)
"""SO_REUSEADDR, SNDBUF, RCVBUF, KEEPALIVE, PASSCRED, RCVTIMEO, SNDTIMEO; so no SO_ATTACH_FILTER."""

PRCTL_OPTIONS: Final = (1, 2, 3, 4, 15, 16, 21, 22, 23, 27, 38, 39, 40, 0x53564D41)
"""SET_ and GET_PDEATHSIG, GET_ and SET_DUMPABLE, SET_ and GET_NAME, GET_ and SET_SECCOMP, CAPBSET_READ, GET_SECUREBITS,
SET_ and GET_NO_NEW_PRIVS, GET_TID_ADDRESS, SET_VMA."""

TERMINAL_QUERIES: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC: all that Python asks of descriptors."""

TERMINAL_INJECTION: Final = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which put input into somebody's terminal (CVE-2017-5226)."""

F_NOTIFY: Final = 1026
"""fcntl's directory notification, inotify's forerunner."""

PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22


def launch_filter(*, devices: bool) -> bytes:
    """The allow-list, as an array of `struct sock_filter`. With `devices` (a GPU) its drivers' ioctls are allowed.

    Raises SandboxFailed if libseccomp is not installed.
    """
    rules = Filter(error(errno.ENOSYS))
    for name in sorted(ALLOWED):
        rules.add(ALLOW, name)
    for name in sorted(FORBIDDEN):
        rules.add(error(errno.EPERM), name)
    rules.add(ALLOW, "clone", has_none_of(0, CLONE_NAMESPACES))
    for name in ("socket", "socketpair"):
        rules.add(ALLOW, name, equals(0, AF_UNIX))
    for option in SOCKET_OPTIONS:
        rules.add(ALLOW, "setsockopt", equals(1, SOL_SOCKET), equals(2, option))
    for option in PRCTL_OPTIONS:
        rules.add(ALLOW, "prctl", equals(0, option))
    if devices:
        rules.add(ALLOW, "ioctl")
    else:
        for request in TERMINAL_QUERIES:
            rules.add(ALLOW, "ioctl", equals(1, request))
    return rules.export()


def script_filter() -> bytes:
    """What is taken away when the script begins: execution, and changes to the limits and filters it runs under."""
    refused = error(errno.EPERM)
    rules = Filter(ALLOW)
    for name in ("execve", "execveat", "setrlimit", "seccomp"):
        rules.add(refused, name)
    rules.add(refused, "prlimit64", is_not(2, 0))
    for option in (PR_SET_DUMPABLE, PR_SET_SECCOMP):
        rules.add(refused, "prctl", equals(0, option))
    for request in TERMINAL_INJECTION:
        rules.add(refused, "ioctl", equals(1, request))
    rules.add(refused, "fcntl", equals(1, F_NOTIFY))
    return rules.export()
