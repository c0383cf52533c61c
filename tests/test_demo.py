"""The demo's data; sample.py and evaluate.py on a model that is trained here, as newcomers do."""
import json
import os
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT, run

import evaluate
import lintseq
import prepare
from config import _demo_problems as demo
from test_train import LONGER


def verdict(problem, program):
    return evaluate.run_program(program, tests=problem["test"], timeout=2, unsafe=True)


def test_family_is_large_and_holds_compositions_out():
    compositions = demo.family_compositions()
    assert len(set(compositions)) == len(compositions) == 25_200
    pairs, problems = demo.family(2000, 100, 5)
    assert (pairs, problems) == demo.family(2000, 100, 5)
    assert len(pairs) == 2000 and len(problems) == 100
    names = "|".join(["", *demo.NAMES, *demo.ARGUMENTS])
    shape = lambda code: re.sub(r"\d+" + names, "_", code)
    trained = {shape(p["response"]) for p in pairs}
    held = {shape(p["canonical_solution"]) for p in problems}
    assert len(held) == 100 and not trained & held
    assert len({p["instruction"] for p in pairs}) == 2000
    lines = [p["response"].count("\n") for p in pairs]
    assert min(lines) >= 5 and max(lines) >= 12 and any("is_prime" in p["response"] for p in pairs)
    assert not any(lintseq.lint(p["response"]) for p in pairs[:200])


def test_hidden_tests_tell_right_from_wrong():
    rng = random.Random(3)
    problems = [demo.family_problem(c, rng) for c in rng.sample(demo.family_compositions(), 40)]
    for p in problems:
        assert verdict(p, p["response"]).passed
    caught = total = 0
    for p in problems:
        for old, new in (("+=", "-="), (" * ", " + "), ("% 2 == 0", "% 2 == 1"), (" > ", " < "),
                         ("= 0", "= 1")):
            if old in p["response"]:
                total += 1
                caught += not verdict(p, p["response"].replace(old, new, 1)).passed
    assert total > 40 and caught / total > 0.9, (caught, total)
    other = [verdict(p, q["response"].replace(q["entry_point"] + "(", p["entry_point"] + "("))
             .passed for p, q in zip(problems, problems[1:])]
    assert sum(other) <= 1  # another problem's program does not do


def test_stdlib_pairs_are_self_contained_and_distinct():
    pairs = [p for p, _ in zip(demo.stdlib_pairs(), range(150))]
    assert len(pairs) == 150 == len({p["response"] for p in pairs})
    for p in pairs:
        assert not lintseq.lint(p["response"])
        assert re.match(r"Write a Python function `\w+\(.*\)`: .{20}", p["instruction"])
        name = re.search(r"`(\w+)\(", p["instruction"])[1]
        assert re.search(rf"^def {name} ?\(", p["response"], re.M)


def test_tokenizer_is_exact_and_writes_edits_in_few_tokens(workspace):
    enc = prepare.get_tokenizer(str(workspace / "tiny.tiktoken"))
    for text in (open(prepare.__file__).read(), " a \r\n\t b  \f\n\n\n  \u2028x  ",
                 "é中\U0001f600 <|diff|>", ""):
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.encode("\n<|diff|>", allowed_special="all")[-1] == enc.n_vocab - 1
    assert len(enc.encode_ordinary("@@ -4,0 +5,2 @@\n+    ")) <= 8


@pytest.fixture(scope="module")
def tuned(workspace):
    """A model that has seen a few steps of edits: it writes something, mostly nonsense."""
    status, out, err = run("train.py", "--dataset=edits", "--max_iters=40", *LONGER,
                           "--out_dir=out-tuned", "--optimizer=muon", cwd=workspace)
    assert status == 0, err
    return workspace


def test_sample_before_any_checkpoint_says_how_to_get_one(tmp_path):
    status, out, err = run("sample.py", cwd=tmp_path)
    assert status == 1 and err.count("\n") == 1 and "make demo" in err and out == ""


def test_sample_writes_programs(tuned):
    """As a user starts it, with a prompt through a pipe; test_sample.py has the other ways."""
    piped = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=120"], cwd=tuned, text=True,
        input="Write a Python function `f(x)`.", capture_output=True)
    out, err = piped.stdout, piped.stderr
    assert piped.returncode == 0, err
    name, prompt, raw = err.split("\n", 2)
    assert name == "# out-tuned"
    assert prompt == "# Write a Python function `f(x)`." and "@@" in raw, err
    assert out.rstrip("\n") == lintseq.apply_edits(raw.split("\n# ")[0]).rstrip("\n")


def test_a_scored_table_of_a_model(tuned):
    status, out, err = run("evaluate.py", "--init_from=out-tuned", "--benchmark=problems.jsonl",
                           "--limit=6", "--num_samples=2", "--ks=1,2", "--max_new_tokens=80",
                           "--unsafe", cwd=tuned)
    assert status == 0, err
    assert "pass@1" in out and "pass@2" in out and "out-tuned" in out


def test_the_pictures_show_the_edits_and_the_scores(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out-demo-eval"
    (folder / "out-demo-edits-t0").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    problem = {"task_id": "family/0", "instruction": "Return `x < 1`.", "entry_point": "f"}
    (tmp_path / "data/demo-problems.jsonl").write_text(json.dumps(problem) + "\n")
    raw = ("@@ -0,0 +1 @@\n+def f(x):\n<|diff|>@@ -1,0 +2 @@\n+    return y\n<|diff|>"
           "@@ -1,0 +2 @@\n+    y = x < 1\n<|diff|>\n<|diff|>")
    row = {"task_id": "family/0", "raw": raw, "passed": True, "edits": 3}
    (folder / "out-demo-edits-t0/samples.jsonl").write_text(json.dumps(row) + "\n")
    runs = [{"model": "out-demo-edits", "temperature": t, "correct": {"family/0": [4, 2]}}
            for t in (0.0, 1.0)]
    (folder / "results.json").write_text(json.dumps({"runs": runs}))
    subprocess.run([sys.executable, "-m", "config._demo_pictures"], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    svg = ElementTree.parse(folder / "edits.svg").getroot()
    texts = [x.text for x in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["Return `x < 1`.", "edit 1", "def f(x):", "edit 2", "def f(x):",
                     "    return y", "edit 3", "def f(x):", "    y = x < 1", "    return y"]
    new = [x.get("x") for x in svg.iter("{http://www.w3.org/2000/svg}rect") if x.get("x")]
    assert len(new) == 3 == len(set(new))  # one line in each panel
    from config._demo_pictures import draw_edits
    ElementTree.fromstring(draw_edits("Write a function.", [[]]))  # a model that wrote no edit
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
