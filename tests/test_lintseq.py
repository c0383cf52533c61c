"""lintseq.py: exact on real files, faithful to the algorithm, deaf to nonsense, and able to be killed."""
import ast
import json
import random
import re
import resource
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import run, start
from hypothesis import HealthCheck, given, settings, strategies as st
from pyflakes.checker import Checker

import lintseq
import prepare
from lintseq import DIFF, END

STDLIB = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py") if "site-packages" not in p.parts)


def stdlib_sources(n, low, high, seed=0):
    found = []
    for path in random.Random(seed).sample(STDLIB, len(STDLIB)):
        try:
            source = path.read_bytes().decode()
            ast.parse(source)
        except (ValueError, SyntaxError):
            continue
        if low <= source.count("\n") <= high and len(found) < n:
            found.append(source)
    return found


def check_sequence(source, edits, clean=True):
    """Everything that holds of every edit sequence: exact, insertions only, no empty edit, clean states."""
    assert lintseq.apply_and_count(lintseq.training_text("", edits)[1]) == (
        source, {"edits": len(edits), "hunks": sum(e.count("\n@@ -") + 1 for e in edits), "malformed": 0})
    dirty, before, total = bool(lintseq.lint(source)), [], 0
    for n, edit in enumerate(edits):
        lines, report = list(before), {"hunks": 0, "malformed": 0}
        lintseq.apply_edit(lines, edit, report)
        added = [line for line in edit.split("\n") if line.startswith("+")]
        assert added and len(lines) == len(before) + len(added)
        assert not [line for line in edit.split("\n") if line[:1] not in ("+", "@")]
        rest = iter(lines)
        assert all(line in rest for line in before)  # the old state is a subsequence of the new one
        total += len(added)
        if clean and not (dirty and n == len(edits) - 1):
            assert lintseq.lint("\n".join(lines)) == []
        before = lines
    assert total == len(source.split("\n"))


def test_exact_on_the_standard_library():
    for i, source in enumerate(stdlib_sources(60, 5, 250)):
        try:
            edits = lintseq.lintseq(source, random.Random(i))
        except ValueError as e:
            assert "no line of code" in str(e) and not ast.parse(source).body
            continue
        check_sequence(source, edits)
        check_sequence(source, lintseq.randseq(source, random.Random(i)), clean=False)


TRICKY = {
    "no newline at the end": "x = 1\nprint(x)",
    "blanks at the ends": "\n\n  \nx = 1  \n\nprint(x)\t\n   \n\n",
    "tabs": "if 1:\n\tx = 1\n\tif x:\n\t\tprint(x)\n",
    "form feed": "x = 1\n\f\ny = x\n\fz = y\n",
    "crlf": "x = 1\r\nif x:\r\n    print(x)\r\n",
    "line separators": "x = 'a\u2028b\x0bc\x85d\x1ce'\ny = x\n",
    "lines like a diff": 'x = """\n+a\n-b\n@@ -1,0 +2 @@\n@@\n c\n"""\ny = x\n-y\n+y\n',
    "backslash": "x = 1 + \\\n    2\nassert x, \\\n    'no'\n",
    "semicolons": "x = 1; y = 2\nif x: y = 3; z = 4\nprint(x); print(y)\n",
    "decorators": "import functools\n\n@functools.cache\n@functools.wraps(len)\ndef f(a,\n      b):\n    return a\n\nf(1, 2)\n",
    "try": "try:\n    x = 1\nexcept ValueError:\n    x = 2\nexcept (OSError,\n        KeyError) as e:\n    x = e\n# c\nelse:\n"
           "    x = 3\nfinally:\n    print(1)\n",
    "elif": "a = 1\nif a:\n    b = 1\nelif a > 1:\n    b = 2\n# why\nelif a > 2: b = 3\nelse:\n\n    # no\n    b = 4\nprint(b)\n",
    "loops": "for i in []:\n    print(i)\nelse:\n    i = 2\nwhile 1:\n    break\nelse: pass\n",
    "match": "def f(x):\n    match (x,\n           1):\n        # one\n        case (1, _):\n            return 1\n        case {'a': y}"
             " if y: return y\n        case _:\n            pass\n",
    "nested else": "if 1:\n    pass\nelse:\n    if 2:\n        x = 1\n    else:\n        x = 2\n",
    "class": 'class A:\n    """Doc\n\n    string."""\n    x = 1\n    def f(self): return self.x\n\nA().f()\n',
    "async": "async def f(x):\n    async with x as y:\n        async for z in y:\n            yield z\n",
    "strings": "x = f'''\n{1 +\n 2}\n'''\ny = ('a'\n     # comment\n\n     'b')\nz = [1,\n\n     2]\nprint(x, y, z)\n",
    "unicode": "é = 'ü\U0001f600'\nprint(é)\n",
    "future": '"""Doc."""\nfrom __future__ import annotations\nimport os\n\ndef f(x: os.PathLike) -> "os":\n    return x\n',
    "globals": "def f():\n    global x\n    x = 1\n\ndef g():\n    return x\n",
    "star": "from os.path import *\n\ndef f():\n    return join('a', 'b')\n",
    "star in the middle": "import os\nprint(os)\nfrom os.path import *\nprint(join)\n",
    "del": "import os\nprint(os)\ndel os\nos = 1\nprint(os)\n\ndef f(x):\n    del x\n    return os\n",
    "typing": "from typing import Optional\nimport os\n\ndef f(x: Optional['C']) -> os.PathLike:\n    y: Optional['C'] = x\n"
              "    return y\n\nclass C:\n    pass\n",
    "rebound": "import os\nx = os\nprint(x)\nx = 1\nos = x\n\nclass A:\n    x = x\n    def f(self, print=print): return x, os\n\n"
               "for print in [x]: print(A)\n",
    "exports": "__all__ = ['f', 'g']\ndef f(): pass\ndef g():\n    pass\n",
    "ligature": "ﬁ = 1\ndef f():\n    return fi\n",
}


@pytest.mark.parametrize("name", TRICKY)
def test_exact_on_tricky_sources(name):
    assert lintseq.lint(TRICKY[name]) == []
    for seed in range(40):
        check_sequence(TRICKY[name], lintseq.lintseq(TRICKY[name], random.Random(seed)))


@pytest.mark.parametrize("source, reason", [
    ("x = 1\ry = 2\n", "carriage return"), (f"x = '{DIFF}'\n", "in the program"), (f"x = '{END}'\n", "in the program"),
    ("# only\n\n# comments\n", "no line of code"), ("", "no line of code"), ("x = (\n", "never closed"), ("\0", "null byte")])
def test_what_cannot_be_written_is_refused_with_the_reason(source, reason):
    for method in (lintseq.lintseq, lintseq.randseq):
        with pytest.raises((ValueError, SyntaxError), match=reason):
            method(source, random.Random(0))


def naive(lines, present, drawn):
    """The algorithm as the paper states it, by indentation and whole-program linting, for programs without statements
    over several lines: what falls with line `drawn`."""
    def below(i, alive):
        indent = lambda k: len(lines[k]) - len(lines[k].lstrip())
        gone = {i}
        for k in (k for k in alive if k > i):
            if indent(k) <= indent(i):
                break
            gone.add(k)
        return gone
    alive = [k for k in present if k not in below(drawn, present)]
    while alive:
        text = [lines[k] for k in alive]
        try:
            bad = [alive[line - 1] for line, _ in lintseq.lint("\n".join(text))]
        except SyntaxError as e:  # a block that was left empty: its header is the error
            bad = [alive[int(re.search(r"on line (\d+)", e.msg)[1]) - 1]]
        if not bad:
            break
        for i in bad:
            alive = [k for k in alive if k not in below(i, alive)]
    return alive


def naive_sequence(source, rng):
    lines = source.split("\n")
    states = [list(range(len(lines)))]
    while states[-1]:
        states.append(naive(lines, states[-1], rng.choice(states[-1])))
    return [[i for i in new if i not in old] for old, new in zip(states[::-1], states[::-1][1:])]


def test_equals_the_paper_s_algorithm_where_statements_are_single_lines():
    """Nothing is deleted that neither indentation nor the linter asked for, and nothing is left that they did."""
    compositions = random.Random(1).sample(prepare.family_compositions(), 40)
    for seed, composition in enumerate(compositions):
        source = prepare.family_program(composition, "f", "a", [3, 4, 5, 2])
        source = "\n".join(line for line in source.split("\n") if line)  # without the blank ones, which are not drawn
        edits = lintseq.lintseq(source, random.Random(seed))
        expected = naive_sequence(source, random.Random(seed))
        lines = source.split("\n")
        assert [[line[1:] for line in e.split("\n") if line[0] == "+"] for e in edits] == [
            [lines[i] for i in new] for new in expected]


def test_lines_are_drawn_uniformly():
    """The frequency of each sequence against its probability by enumeration."""
    source = "a = 1\nb = 2\nif a:\n    b = a\n    c = 3\nprint(b)"
    lines = source.split("\n")

    def enumerate_from(present, p, path, table):
        if not present:
            table[tuple(path)] += p
        for i in present:
            left = naive(lines, present, i)
            enumerate_from(left, p / len(present), path + [tuple(k for k in present if k not in left)], table)

    expected, n = Counter(), 20_000
    enumerate_from(list(range(6)), 1.0, [], expected)
    assert len(expected) > 30 and abs(sum(expected.values()) - 1) < 1e-9
    seen, rng = Counter(), random.Random(7)
    for _ in range(n):
        program = lintseq.lintseq(source, rng)
        seen[tuple(tuple(sorted(lines.index(x[1:]) for x in e.split("\n") if x[0] == "+")) for e in reversed(program))] += 1
    assert set(seen) <= set(expected)
    chi2 = sum((seen[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5  # five standard deviations


def test_statements_over_several_lines_come_whole():
    source = "import os\n\n@os.register_at_fork\ndef f(a,\n      b):\n    x = [a,\n         b]\n    return x\n"
    for seed in range(30):
        for edit in lintseq.lintseq(source, random.Random(seed)):
            for whole in (("@os", "+def f", "+      b"), ("+    x", "+         b]")):
                assert len({part in edit for part in whole}) == 1


def test_lines_broken_from_the_start_come_last():
    source = "x = 1\nprint(y)\nz = x\nif q:\n    z = 2"
    for seed in range(10):
        edits = lintseq.lintseq(source, random.Random(seed))
        broken = {"+print(y)", "+if q:", "+    z = 2"}  # with the first line drawn
        assert broken <= set(edits[-1].split("\n")) and not broken & set("\n".join(edits[:-1]).split("\n"))
        check_sequence(source, edits)


@pytest.mark.parametrize("source, errors", [
    ("print(x)", 1), ("def f():\n    print(x)\n    x = 1\n", 1), ("x = 1\ndef f():\n    print(x)\n    x = 2\n", 1),
    ("return 1", 1), ("__all__ = ['x']", 1), ("import os", 0), ("def f():\n    x = 1\n", 0), ("'%s %s' % (1,)", 0),
    ("def f(): pass\ndef f(): pass", 0), ("f''", 0), ("break", 1), ("x: 'a b' = 1", 1)])
def test_what_counts_as_an_error(source, errors):
    try:
        assert len(lintseq.lint(source)) == errors
    except SyntaxError:
        assert errors


def test_our_linter_reports_what_pyflakes_does():
    sources = stdlib_sources(60, 1, 600, seed=3) + list(TRICKY.values())
    broken = [re.sub(r"^(import|from|def) .*$", "pass", s, count=2, flags=re.M) for s in sources]  # names that are missing
    found = 0
    for source in sources + broken:
        try:
            tree, other = ast.parse(source), ast.parse(source)
        except SyntaxError:
            continue
        theirs = sorted((x.lineno, x.message % x.message_args) for x in Checker(other).messages
                        if isinstance(x, lintseq.ERRORS))
        assert sorted(lintseq.Linter(tree, "typing" in source).errors()) == theirs
        found += len(theirs)
    assert found > 50


# -- What a model writes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, program, malformed", [
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1,0 +2 @@\n+c\n<|diff|>\n<|diff|>", "a\nc\nb", 0),
    ("@@ -0,0 +1,2 @@\n+a\n+b\n@@ -9,0 +3 @@\n+c", "a\nb", 1),  # out of range
    ("@@ -0,0 +1,3 @@\n+a\n+b", "a\nb", 1),  # cut off
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1 +1 @@\n-a\n+c", "c\nb", 0),  # a published model's replacement
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -1,2 +0,0 @@\n-a\n-b", "", 0),
    ("@@ -0,0 +1 @@\n+a\n<|diff|>@@ -1 +1 @@\n-other\n+c", "c\na", 1),  # nothing to delete
    ("@@ -0,0 +1,2 @@\n+a\n+b\n<|diff|>@@ -0,0 +1 @@\n+x\n@@ -1,0 +3 @@\n+y\n@@ -2,0 +5 @@\n+z", "x\na\ny\nb\nz", 0),
    ("@@ -0,0 @@\n+a", "", 1), ("hello", "", 1), ("", "", 0), ("@@ -0,0 +1 @@\n+a\nnoise", "a", 1),
    ("@@ -0,0 +1,2 @@\n+a\n+\n<|diff|>", "a\n", 0), ("@@ -0,0 +1 @@\n+a<|endoftext|>@@ -0,0 +1 @@\n+b", "a", 0)])
def test_apply_edits(text, program, malformed):
    assert lintseq.apply_edits(text) == program
    assert lintseq.apply_and_count(text)[1]["malformed"] == malformed


PIECES = st.sampled_from(["@@ -0,0 +1 @@", "@@ -1,0 +2,2 @@", "@@ -3 +3 @@", "+a", "-a", " a", "+", "@@", "@@ -99999999999,0 +1 @@",
                          DIFF, "\n", "\n", "\n", END, "x", "\r", "\0"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=60).map("".join))
def test_apply_edits_never_raises(text):
    program, report = lintseq.apply_and_count(text)
    assert program == lintseq.apply_edits(text) and 0 <= report["malformed"] <= report["hunks"] + report["edits"]


SOURCES = stdlib_sources(25, 5, 60, seed=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SOURCES), st.integers(0, 2 ** 32), st.data())
def test_mutated_edits_are_applied_as_far_as_they_go(source, seed, data):
    try:
        text = lintseq.training_text("", lintseq.lintseq(source, random.Random(seed)))[1]
    except ValueError:
        return
    assert lintseq.apply_edits(text) == source
    cut = data.draw(st.integers(0, len(text)))
    state = lintseq.apply_edits(text[:cut])
    whole = text[:cut].rfind("\n" + DIFF)
    if whole >= 0:  # the edits before the cut are all there
        rest = iter(state.split("\n"))
        assert all(line in rest for line in lintseq.apply_edits(text[:whole]).split("\n"))
    at = data.draw(st.integers(0, len(text)))
    lintseq.apply_and_count(text[:at] + data.draw(st.text(max_size=5)) + text[at + data.draw(st.integers(0, 9)):])


def test_a_megabyte_of_noise_is_no_matter():
    rng = random.Random(0)
    noise = "".join(rng.choice(["@@ -1,0 +2 @@\n", "+x\n", "-x\n", DIFF, "y" * 50, "\n"]) for _ in range(120_000))
    assert len(noise) > 10 ** 6
    program, report = lintseq.apply_and_count(noise)
    assert report["malformed"] > 1000


# -- In bulk ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def rows(tmp_path):
    compositions = random.Random(2).sample(prepare.family_compositions(), 300)
    lines = [json.dumps({"instruction": f"row {i}", "response": prepare.family_program(c, "f", "a", [3, 4, 5, 2])})
             for i, c in enumerate(compositions)]
    lines[7] = '{"instruction": "row 7", "response": "x = ("}'
    lines[8] = '{"instruction": "row 8"}'
    lines[9] = '{"instruction": '
    lines[20] = json.dumps({"instruction": "row 20", "response": f"x = '{DIFF}'"})
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


ARGS = ("--source=in.jsonl", "--samples=3", "--seed=4")


def test_bulk_rows_are_the_published_ones_and_the_same_for_any_workers(rows):
    status, out, err = run("lintseq.py", *ARGS, "--dest=one.jsonl", "--workers=1", cwd=rows)
    assert status == 0 and "296 programs" in out and "edits a program: median" in out, err
    assert run("lintseq.py", *ARGS, "--dest=two.jsonl", "--workers=2", cwd=rows)[0] == 0
    assert (rows / "one.jsonl").read_bytes() == (rows / "two.jsonl").read_bytes()
    written = [json.loads(line) for line in open(rows / "one.jsonl")]
    source = [json.loads(line) if i not in (9,) else None for i, line in enumerate(open(rows / "in.jsonl"))]
    assert [r["index"] for r in written] == [i for i in range(300) if i not in (7, 8, 9, 20) for _ in range(3)]
    for r in written:
        assert set(r) == {"edit_path", "index", "source_instruction", "source_response"}
        assert r["source_instruction"] == f"row {r['index']}" and r["source_response"] == source[r["index"]]["response"]
        assert lintseq.apply_edits(lintseq.training_text("", r["edit_path"])[1]) == r["source_response"]
    distinct = [len({tuple(r["edit_path"]) for r in written[i:i + 3]}) for i in range(0, len(written), 3)]
    assert sum(distinct) / len(distinct) > 2.9  # repeats are drawn again
    skipped = {r["index"]: r["reason"] for r in map(json.loads, open(rows / "one.jsonl.skipped.jsonl"))}
    assert set(skipped) == {7, 8, 9, 20} and "never closed" in skipped[7] and "response" in skipped[8]
    status, again, err = run("lintseq.py", *ARGS, "--dest=one.jsonl", cwd=rows)  # complete: the same figures, nothing new
    assert status == 0 and figures(again) == figures(out) and (rows / "one.jsonl").read_bytes() == (rows / "two.jsonl").read_bytes()
    table = Counter(len(r["edit_path"]) for r in written)
    median = sorted(table.elements())[len(written) // 2]
    assert f"edits a program: median {median}," in out and "skipped 2: no JSON" in out and "skipped 1: does not parse" in out


def figures(out):
    return re.sub(r"[\d.]+ s;", "", out[out.index("\nlintseq.py: "):])


@pytest.mark.parametrize("args, message", [
    (("--method=randseq",), "is of other settings"), (("--method=x",), "--method=x"), (("--samples=0",), "--samples"),
    (("--dest=in.jsonl",), "the source itself"), (("--dest=in.jsonl/out.jsonl",), "in.jsonl"), (("--source=none",), "no such file")])
def test_a_mistake_is_told_in_one_line_and_touches_nothing(rows, args, message):
    (rows / "in.jsonl").write_text('{"instruction": "f", "response": "x = 1"}\n')
    assert run("lintseq.py", *ARGS, "--dest=out.jsonl", "--workers=1", cwd=rows)[0] == 0
    before = {p: p.read_bytes() for p in rows.iterdir()}
    status, out, err = run("lintseq.py", *ARGS, "--dest=out.jsonl", "--workers=1", *args, cwd=rows)
    assert status == 1 and message in err and err.count("\n") == 1 and "Traceback" not in err
    assert before == {p: p.read_bytes() for p in rows.iterdir()}


def test_a_run_cut_short_goes_on_without_a_lost_or_doubled_row(rows):
    """By a full disk (here: a limit on the size of files), by kill -9, and by a cut at any byte of both files."""
    status, whole_out, err = run("lintseq.py", *ARGS, "--dest=whole.jsonl", cwd=rows)
    whole, skipped, state = ((rows / f"whole.jsonl{end}").read_bytes() for end in ("", ".skipped.jsonl", ".state.json"))
    rng = random.Random(0)
    for cut in [0, len(whole), *(rng.randrange(len(whole)) for _ in range(4))]:
        (rows / "cut.jsonl").write_bytes(whole[:cut])
        (rows / "cut.jsonl.skipped.jsonl").write_bytes(skipped[:rng.randrange(len(skipped) + 1)])
        (rows / "cut.jsonl.state.json").write_bytes(state)
        status, out, err = run("lintseq.py", *ARGS, "--dest=cut.jsonl", "--workers=1", cwd=rows)
        assert status == 0 and figures(out).replace("cut", "whole") == figures(whole_out)  # of all rows, not of the rest
        assert ((rows / "cut.jsonl").read_bytes(), (rows / "cut.jsonl.skipped.jsonl").read_bytes()) == (whole, skipped)
    (rows / "cut.jsonl.state.json").write_bytes(state[:9])
    status, out, err = run("lintseq.py", *ARGS, "--dest=cut.jsonl", cwd=rows)
    assert status == 1 and "broken" in err and err.count("\n") == 1

    process = start("lintseq.py", *ARGS, "--dest=kill.jsonl", "--workers=1", cwd=rows,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 3,) * 2))
    out, err = process.communicate()
    assert process.returncode == 1 and "File too large" in err and "Traceback" not in err
    process = start("lintseq.py", *ARGS, "--dest=kill.jsonl", "--workers=1", cwd=rows)
    while (rows / "kill.jsonl").stat().st_size < len(whole) // 2:
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    assert children
    assert run("lintseq.py", *ARGS, "--dest=kill.jsonl", cwd=rows)[0] == 0
    assert ((rows / "kill.jsonl").read_bytes(), (rows / "kill.jsonl.skipped.jsonl").read_bytes()) == (whole, skipped)
    deadline = time.time() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):  # the killed run's worker has ended too
        assert time.time() < deadline
        time.sleep(0.1)


def test_ranks_take_shares(rows):
    assert run("lintseq.py", *ARGS, "--dest=all.jsonl", cwd=rows)[0] == 0
    status, out, err = run("lintseq.py", *ARGS, "--dest=part.jsonl", "--workers=1", cwd=rows, ranks=2)
    assert status == 0, err
    parts = [line for r in (0, 1) for line in open(rows / f"part.jsonl.{r}-of-2")]
    assert sorted(parts) == sorted(open(rows / "all.jsonl"))


def test_a_file_is_shown_edit_by_edit(tmp_path):
    (tmp_path / "f.py").write_text(TRICKY["elif"])
    status, out, err = run("lintseq.py", "f.py", cwd=tmp_path)
    assert status == 0 and "--- edit 1 of " in out and sum(line.startswith("+ ") for line in out.splitlines()) == \
        len(TRICKY["elif"].split("\n"))
    for args, message in ((("nothing.py",), "nothing.py"), (("f.py", "--method=x"), "--method=x"), ((), "name a Python file"),
                          (("--source=x", "--dest=y"), "no such file")):
        status, out, err = run("lintseq.py", *args, cwd=tmp_path)
        assert status == 1 and message in err and err.count("\n") == 1
