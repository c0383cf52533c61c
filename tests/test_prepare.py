"""prepare.py: corpora of every format, few documents, kill -9, ranks, instruction data."""
import functools
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call, run, start

import prepare

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402


def parquet(path, column, texts, kind=None, **kwargs):
    columns = {"id": list(range(len(texts))), column: pyarrow.array(texts, kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **kwargs)


def noise(n, seed=0):
    return random.Random(seed).randbytes(n)


def bins(folder):
    return {split: np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val")}


def texts_of(folder, enc):
    """The documents of the bins, in their order."""
    found = {}
    for split, tokens in bins(folder).items():
        ends = np.flatnonzero(tokens == enc.eot_token)
        found[split] = [enc.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert not len(tokens) or tokens[-1] == enc.eot_token
    return found


# -- Corpora --------------------------------------------------------------------------------------

def test_every_format_and_what_is_broken_in_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enc, place = prepare.get_tokenizer(tokenizer), tmp_path / "corpus"
    place.mkdir()
    line = "naïve café 東京 🙂\r\n\tx = 1  \n"
    g = sorted((f"document {i}: " + line * i for i in range(1, 41)), key=len)
    (place / "a.py").write_text(g[0], newline="")
    (place / "a_latin.py").write_bytes("café".encode("latin-1"))
    (place / "empty.txt").write_text("")
    (place / "b.txt").write_bytes(b"\xef\xbb\xbf" + g[1].encode())  # a byte order mark is no text
    rows = [json.dumps({"text": t}) for t in g[2:8]] + [json.dumps({"content": g[8]})]
    broken = ["{", "[1]", '{"other": 1}', '{"text": 5}', '{"text": ""}', '{"text": "\\ud800"}', "",
              "[" * 100_000]
    lines = [line for pair in zip(rows, broken) for line in pair] + [broken[7]]
    (place / "c.jsonl").write_text("\n".join(lines))
    last = json.dumps({"text": g[9]}).encode()  # without a new line
    (place / "c_bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' + last)
    with gzip.open(place / "d.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": t}) for t in g[10:15]))
    cut = "".join(json.dumps({"text": t}) + "\n" for t in g[15:18]) + noise(50_000).hex()
    (place / "e_cut.jsonl.gz").write_bytes(gzip.compress(cut.encode())[:-2000])
    parquet(place / "f.parquet", "text", g[18:30], row_group_size=5)
    parquet(place / "g.parquet", "content", g[30:40] + [None, ""], pyarrow.large_string(),
            row_group_size=3)
    parquet(place / "h.parquet", "text", [g[0].encode(), b"caf\xe9", b"fine"], pyarrow.binary())
    whole = (place / "f.parquet").read_bytes()
    (place / "i_cut.parquet").write_bytes(whole[:-100])
    parquet(place / "j.parquet", "label", ["no text"])
    parquet(place / "j_numbers.parquet", "text", [1, 2])
    damaged = bytearray(whole)
    damaged[20:200] = noise(180)
    (place / "k.parquet").write_bytes(damaged)

    status, out, err = run("prepare.py", f"--corpora={place}", f"--tokenizer={tokenizer}",
                           "--dataset=x", "--val_fraction=0.25", cwd=".")
    assert status == 0, err
    meta = json.loads(Path("data/x/meta.json").read_text())
    found = texts_of(Path("data/x"), enc)
    everything = [text.replace("\r\n", "\n") for text in found["train"] + found["val"]]
    assert set(everything) >= {text.replace("\r\n", "\n") for text in g} and "fine" in everything
    for split in found:
        assert meta[split] == {"tokens": len(bins(Path("data/x"))[split]),
                               "documents": len(found[split])}
        assert all((prepare.hash_text(t) < 0.25) == (split == "val") for t in found[split])
    assert len(found["val"]) > 3
    listed = [json.loads(line) for line in Path("data/x/skipped.jsonl").open()]
    reasons = {}
    for name, reason in listed:
        name = Path(re.split("[,:]", name)[0]).name
        reasons.setdefault(reason.partition(":")[0], []).append(name)
    assert meta["skipped"] == {reason: len(names) for reason, names in reasons.items()}
    assert sorted(reasons.pop("not UTF-8")) == ["c.jsonl", "c_bytes.jsonl", "h.parquet"]
    assert sorted(reasons.pop("no text")) == ["c.jsonl"] * 3 + ["empty.txt"] + ["g.parquet"] * 2
    assert reasons.pop("not JSON") + reasons.pop("not a JSON object") == ["c.jsonl"] * 3
    assert {n for names in reasons.values() for n in names} == {
        "a_latin.py", "e_cut.jsonl.gz", "i_cut.parquet", "j.parquet", "j_numbers.parquet",
        "k.parquet"}
    assert all(reason.startswith("unreadable.") for reason in reasons)
    assert "unreadable.parquet" in out
    assert not list(Path("data/x").glob("shards*"))


def words(n, seed=0):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(n))


@pytest.mark.parametrize("val_fraction", ["0.01", "0.1", "0.9"])
@pytest.mark.parametrize("documents", [1, 12])
def test_few_documents_are_split_within(tokenizer, tmp_path, documents, val_fraction):
    """nanoGPT's first example, a single input.txt; and a folder of twelve files."""
    (tmp_path / "text").mkdir()
    for i in range(documents):
        (tmp_path / f"text/input{i}.txt").write_text(words(4000 // documents, i))
    corpus = "text/input0.txt" if documents == 1 else "text"
    status, out, err = run("prepare.py", f"--corpora={corpus}", "--tokenizer=own.tiktoken",
                           f"--val_fraction={val_fraction}", "--bpe_size=300", "--dataset=x",
                           "--workers=1", cwd=tmp_path)
    assert status == 0, err
    enc, found = prepare.get_tokenizer(str(tmp_path / "own.tiktoken")), bins(tmp_path / "data/x")
    meta = json.loads((tmp_path / "data/x/meta.json").read_text())
    total = sum(map(len, found.values()))
    assert len(found["val"]) >= 0.09 * total and len(found["train"]) > 256
    assert {split: len(tokens) for split, tokens in found.items()} == {
        split: meta[split]["tokens"] for split in found}
    if documents == 1:
        assert enc.decode(np.concatenate([found["train"], found["val"]]).tolist()) == words(
            4000) + prepare.EOT
        assert re.search("1 documents are too few to hold out one: the last .* are held out", out)
    if val_fraction == "0.9":
        assert 0.7 < len(found["val"]) / total < 1


def test_nothing_to_validate_on_is_said_and_nothing_to_train_on_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad/b.parquet").write_text("no Parquet")
    (tmp_path / "none").mkdir()
    args = (f"--tokenizer={tokenizer}", "--dataset=x")
    for corpus, message in (("bad", "nothing to train on: data/x/skipped.jsonl lists"),
                            ("none", "corpora: none is neither stdlib"),
                            ("gone.txt", "corpora: gone.txt is")):
        try_it = run if corpus == "bad" else call  # its workers are processes
        status, out, err = try_it("prepare.py", f"--corpora={corpus}", *args, cwd=tmp_path)
        assert status == 1 and message in err.splitlines()[-1] and "Traceback" not in err
        assert not (tmp_path / "data/x/meta.json").exists()
    (tmp_path / "bad/a.txt").write_bytes(b"cafe")  # mended, and of the same size
    assert run("prepare.py", "--corpora=bad", "--workers=1", *args, cwd=tmp_path)[0] == 0
    status, out, err = run("prepare.py", "--corpora=a.txt", "--val_fraction=0", args[0],
                           "--dataset=y", "--workers=1", cwd=tmp_path)
    assert status == 0 and "val: 0 tokens, 0 documents" in out


@pytest.mark.parametrize("args, status, message", [
    ((), 2, "nothing to prepare: give a config file"), (("--dataset=x",), 2, "nothing to prepare"),
    (("--instruct=a.jsonl",), 2, "--instruct=… with --source=…"),
    (("--instruct=a.jsonl", "--corpora=a.txt"), 2, "--instruct=… with --source=…"),
    (("--corpora=the-stack:1e2", "--tokenizer=new.tiktoken"), 1, "'1e2' is no number of files"),
    (("--form=edits", "--dest=part.jsonl"), 1, "part.jsonl is not whole: part.jsonl.state.json"),
    (("--form=edits", "--dest=old.jsonl"), 1, "old.jsonl is not whole: old.jsonl.state.json"),
    (("--form=edits", "--dest=ranks.jsonl"), 1, "ranks.jsonl.1-of-2.state.json says"),
    (("--corpora=a.txt", "--val_fraction=1"), 2, "at most 0.9"),
    (("--corpora=a.txt", "--val_fraction=-0.1"), 2, "at least 0"),
    (("--form=edit",), 2, "is not edits or programs"), (("--bpe_size=10",), 2, "at least 256"),
    (("--form=edits", "--dest=no.jsonl"), 1, "'no.jsonl' is needed: lintseq.py makes"),
    (("--form=edits", "--dest=e"), 1, "cat joins what its ranks wrote"),
    (("--instruct=family", "--source=f.jsonl", "--family_heldout=16000"), 2,
     "--family_heldout=16000: the family has"),
    (("--workers=1e30",), 2, "workers='1e30' is not at least 0 and at most 2147483647"),
    (("--instruct=no.jsonl", "--source=s.jsonl"), 1, "No such file or directory: 'no.jsonl'"),
    (("--export=no",), 1, "--export=no: "), (("--corpora=a.txt", "--tokenizer=torn.tiktoken"), 1,
                                             "tokenizer=torn.tiktoken: "),
    (("--corpora=a.txt", "--tokenizer=torn.json"), 1, "tokenizer=torn.json: "),
    (("--corpora=a.txt", "--tokenizer=a.txt"), 1, "tokenizer=a.txt: ")])
def test_what_cannot_be_done_gets_one_line(tmp_path, args, status, message):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "torn.tiktoken").write_text("IQ== 0\nIg== 1\n")
    (tmp_path / "torn.json").write_text("{")
    for name, states in (("part", {"": [[], [0, 0], {}, False]}), ("old", {"": [[], [0, 0], {}]}),
                         ("ranks", {".0-of-2": [[], [0, 0], {}, True],
                                    ".1-of-2": [[], [0, 0], {}, False]})):
        (tmp_path / f"{name}.jsonl").write_text("")
        for rank, state in states.items():
            (tmp_path / f"{name}.jsonl{rank}.state.json").write_text(json.dumps(state))
    try_it = call if args else run  # one as users start it
    got, out, err = try_it("prepare.py", *args, cwd=tmp_path)
    assert got == status and message in err.splitlines()[-1] and out == "", err
    assert err.count("\n") == 1 or "--instruct=no.jsonl" in args  # a progress bar


def test_instructions_that_give_no_pair_are_refused_and_old_pairs_are_said(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "response": "y = 1"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "x"}\n')
    for name in ("empty", "b"):
        status, out, err = call("prepare.py", f"--instruct={name}.jsonl", "--source=s.jsonl",
                                cwd=tmp_path)
        assert status == 1 and err.endswith(
            f"no pair in instruct={name}.jsonl: s.jsonl.skipped.jsonl says why\n"), err
        assert not (tmp_path / "s.jsonl").exists()
    for said in ("1 pairs -> s.jsonl", "s.jsonl is there already; delete it to make it anew"):
        status, out, err = call("prepare.py", "--instruct=a.jsonl", "--source=s.jsonl",
                                cwd=tmp_path)
        assert status == 0 and said in out, err


def test_two_runs_into_one_folder(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(200_000))
    args = ("prepare.py", "--corpora=a.txt", f"--tokenizer={tokenizer}", "--dataset=x")
    first = start(*args, cwd=tmp_path)
    while not (tmp_path / "data/x/.lock0").exists():
        time.sleep(0.01)
    status, out, err = run(*args, cwd=tmp_path)
    assert first.wait() == 0
    assert status == 1 and "another run is writing there" in err and err.count("\n") == 1


def test_shards_of_a_jsonl_lose_nothing(monkeypatch, tmp_path):
    texts = [f"{i} " + "x" * random.Random(i).randrange(300) for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for size in (50, 64, 333, 10 ** 6):  # rows longer than a shard too
        monkeypatch.setattr(prepare, "SHARD_BYTES", size)
        assert [t for _, t in prepare.read_documents(str(path))] == texts


def test_long_texts_get_the_tokens_of_one_encoding(tokenizer):
    enc = prepare.get_tokenizer(tokenizer)
    text = "\n".join(p.read_text() for p in sorted(ROOT.glob("*.py"))) * 3
    assert len(text) > 3 * 131_072
    assert prepare.encode_text(enc, text) == enc.encode_ordinary(text)
    for odd in (" " * 3_000_000, "a" * 500_000, " \n" * 500_000 + "x", "x\n" + "\t" * 500_000, ""):
        assert enc.decode(prepare.encode_text(enc, odd)) == odd  # tiktoken alone dies of the first


SMALL_SHARDS = "import config, prepare; prepare.SHARD_BYTES = 1 << 17; config.run(prepare.main)"


def start_small(*args, env=()):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict(env)}
    return subprocess.Popen([sys.executable, "-c", SMALL_SHARDS, *args], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_kill_9_workers_and_ranks_change_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [t for _, t in prepare.read_documents("stdlib")][:220]
    Path("a").mkdir()
    parquet("a/0.parquet", "text", texts[:80], row_group_size=10)
    Path("a/1.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[80:200]))
    for i, t in enumerate(texts[200:]):
        Path(f"a/2{i:02}.py").write_text(t)
    args = ("--corpora=a", f"--tokenizer={tokenizer}", "--val_fraction=0.1")
    plain = start_small("--dataset=plain", "--workers=1", *args)
    out, _ = plain.communicate()
    assert plain.returncode == 0, out
    assert int(re.search(r"tokens, (\d+) shards", out)[1]) > 15
    wanted = bins(Path("data/plain"))
    assert len(wanted["train"]) > 500_000 and len(wanted["val"]) > 10_000

    killed, folder = 0, Path("data/killed")
    while killed < 3:  # at different places; the last run goes through
        process = start_small("--dataset=killed", "--workers=2", *args)
        goal = 2 + 5 * killed
        while process.poll() is None and len(list(folder.glob("shards-*/*.json"))) <= goal:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()  # its workers hold the pipe: this waits for them to end too
        killed += 1
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("shards-*/*.json")}
    process = start_small("--dataset=killed", "--workers=2", *args)
    while process.poll() is None:
        for p in stamps:
            try:
                assert p.stat().st_mtime_ns == stamps[p]  # not done again
            except FileNotFoundError:
                pass  # all are joined
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[0]
    for split in wanted:
        assert np.array_equal(bins(folder)[split], wanted[split])
    assert (folder / "meta.json").read_text() == Path("data/plain/meta.json").read_text()

    ranks = [start_small("--dataset=ranks", "--workers=1", *args, env={
        "RANK": str(r), "WORLD_SIZE": "2"}) for r in (0, 1)]
    for process in ranks:
        out, _ = process.communicate()
        assert process.returncode == 0, out
    for split in wanted:
        assert np.array_equal(bins(Path("data/ranks"))[split], wanted[split])


KILL_AT = """import os, signal, sys, config, prepare
left = int(sys.argv.pop())
def kill_after(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for owner, name in ((os, "fsync"), (os, "sync"), (os, "replace"), (prepare.shutil, "copyfileobj"),
                    (prepare.shutil, "rmtree"), (prepare.np, "fromfile")):
    setattr(owner, name, kill_after(getattr(owner, name)))
prepare.SHARD_BYTES = 8000
config.run(prepare.main)"""


def test_joining_can_be_killed_before_any_of_its_steps(tokenizer, tmp_path):
    """Shards that are done are joined; the run is killed before each of its writes in turn."""
    rows = [json.dumps({"text": f"text {i} " * 30}) + "\n" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    args = ("--corpora=a.jsonl", f"--tokenizer={tokenizer}", "--val_fraction=0.3", "--workers=1")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    wanted, ends = None, []
    for left in (99, 0, 3, 6, 8, 9):
        for argument in (left, 99):
            process = subprocess.run(
                [sys.executable, "-c", KILL_AT, *args, f"--dataset={left}", str(argument)],
                env=env, cwd=tmp_path, capture_output=True, text=True)
            ends.append(process.returncode)
            if process.returncode == 0:
                break
        assert process.returncode == 0, process.stderr
        found = bins(tmp_path / f"data/{left}")
        wanted = wanted or found
        assert all(np.array_equal(found[split], wanted[split]) for split in found)
        assert len(found["val"]) > 100 and not list((tmp_path / f"data/{left}").glob("shards*"))
    assert ends.count(-signal.SIGKILL) >= 4


PEAK = """import config, prepare, resource
config.run(prepare.main)
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000)"""


def test_a_full_disk_is_said_and_nothing_is_missing_then(tokenizer, tmp_path):
    """Here: a limit on the size of files. Short documents, whose tokens wait in a buffer."""
    rows = [json.dumps({"text": words(20, i)}) for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    args = ("--corpora=a.jsonl", "--dataset=x", f"--tokenizer={tokenizer}")
    limit = (100_000, 100_000)
    process = start("prepare.py", *args, cwd=tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "File too large" in err, err
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 0
    enc = prepare.get_tokenizer(str(tokenizer))
    texts = sum(texts_of(tmp_path / "data/x", enc).values(), [])
    assert sorted(texts) == sorted(json.loads(row)["text"] for row in rows)


def test_a_text_that_changed_is_tokenized_again(tokenizer, tmp_path, monkeypatch):
    """Also where a run was killed, and the text has kept its size."""
    (tmp_path / "a.txt").write_text(words(500))
    args = ("--corpora=a.txt", "--dataset=x", f"--tokenizer={tokenizer}")
    monkeypatch.setattr(prepare, "join_shards", lambda *_: exit(9))
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 9
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text(words(500).upper())
    os.utime(tmp_path / "a.txt", (1, 1))
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 0
    enc = prepare.get_tokenizer(str(tokenizer))
    tokens = np.concatenate([np.fromfile(tmp_path / f"data/x/{s}.bin", "<u2")
                             for s in ("train", "val")])
    assert enc.decode(tokens.tolist()).startswith(words(500).upper()[:1000])


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path, monkeypatch):
    """A few times the longest document (here 6 MB) is held, not the file."""
    monkeypatch.chdir(tmp_path)
    line = "def f(x):\n    return x + 1  # some words that fill the line\n"
    Path("a").mkdir()
    with open("a/long.txt", "w") as f:
        f.writelines(line * 1000 for _ in range(300))  # 18 MB
    with open("a/longer.jsonl", "w") as f:  # a row of 6 MB, and one in characters of four bytes
        f.write('{"text": "' + "x y z " * 1_000_000 + '"}\n')
        f.write(json.dumps({"text": "\U0001f642 " + "x " * 500_000}, ensure_ascii=False))
    parquet("a/many.parquet", "text", [f"{i}\n" + line * 10_000 for i in range(30)])
    process = subprocess.run(
        [sys.executable, "-c", PEAK, f"--tokenizer={tokenizer}", "--dataset=x", "--corpora=a",
         "--workers=2"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True)
    assert process.returncode == 0, process.stderr
    meta = json.loads(Path("data/x/meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == 3 + 2 + 30
    assert int(process.stdout.split("peak ")[1]) < 400  # MB, of the largest worker


def test_tokenizers_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    for key in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")
    for name, message in (("p50k_base", "from the network at their first use"),
                          ("p50k_bas", "p50k_base, "), ("none.json", "No such file")):
        try_it = run if "p50k_base" in name else call  # the one that asks a network
        status, out, err = try_it("prepare.py", "--corpora=a.txt", f"--tokenizer={name}",
                                  "--dataset=x", cwd=".")
        assert status == 1 and err.startswith(f"prepare.py: tokenizer={name}: ") and message in err
        assert err.count("\n") == 1, err


def test_a_tokenizer_too_large_for_16_bits(tmp_path, tokenizer):
    lines = Path(tokenizer).read_text()
    extra = "".join(f"{prepare.base64.b64encode(b'%6d' % i).decode()} {i}\n"
                    for i in range(len(lines.splitlines()), 65_600))
    (tmp_path / "large.tiktoken").write_text(lines + extra)
    (tmp_path / "a.txt").write_text("text")
    status, out, err = call("prepare.py", "--corpora=a.txt", "--tokenizer=large.tiktoken",
                            "--dataset=x", cwd=tmp_path)
    assert status == 1 and "65,602 entries" in err and err.count("\n") == 1


# -- Instruction data -----------------------------------------------------------------------------

def test_code_in_markdown():
    text = "Here:\n```python\nx = 1\n```\nand\n```py\ny = 2\n```\n```bash\nls\n```"
    assert prepare.extract_code(text) == "x = 1\ny = 2\n"
    text = "1. do\n   ```Python title=a\n   def f():\n       return 1\n   ```\n"
    assert prepare.extract_code(text) == "def f():\n    return 1\n"
    assert prepare.extract_code("```\nx = 1\n```") == "x = 1\n"
    assert prepare.extract_code("```python\nx = 1") == "x = 1\n"  # cut off
    assert prepare.extract_code("def f():\n    return 1") == "def f():\n    return 1\n"
    assert prepare.extract_code("I cannot do that.") == ""
    assert prepare.extract_code("```rust\nfn main() {}\n```") == ""


def problem(i):
    rng = random.Random(i)
    names = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(40)]
    lines = "".join(f"    {a} = {b} + {i}\n" for a, b in zip(names[12:], names[5:]))
    return (f"Write a function {names[0]} that takes {' and '.join(names[1:12])}.",
            f"def {names[0]}({', '.join(names[1:5])}):\n" + lines)


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def has_close_elements(numbers):\n    """ Check if in given list of numbers, '
              'are any two numbers closer to each other than given threshold.\n    """\n',
    "canonical_solution": "    for idx, elem in enumerate(numbers):\n"
                          "        for idx2, elem2 in enumerate(numbers):\n"
                          "            if idx != idx2:\n"
                          "                distance = abs(elem - elem2)\n"
                          "                if distance < threshold:\n"
                          "                    return True\n\n    return False\n"}
MBPP = {"task_id": 11, "text": "Write a python function to shift the zebras left.",
        "code": "def zebra(a):\n    return a[::-1]"}


def test_instruct_is_clean(hub):
    fence = "Sure!\n```python\n{}```\nThis works because of reasons.".format
    clean = [problem(i) for i in range(30)]
    near = clean[3][1].replace(clean[3][1].split()[-1], "other", 1)
    magicoder = [{"lang": "python", "problem": q, "solution": fence(a)} for q, a in clean[:20]] + [
        {"lang": "rust", "problem": "q", "solution": "```rust\nfn main() {}\n```"},
        {"lang": "python", "problem": "a repeated answer", "solution": fence(clean[0][1])},
        {"lang": "python", "problem": clean[3][0], "solution": fence(near)},
        {"lang": "python", "problem": "Please, CHECK if in given list of numbers, are any two "
                                      "numbers closer to each other.",
         "solution": fence("def g(n):\n    return n\n")},
        {"lang": "python", "problem": "Explain", "solution": "No code here."}, {"lang": "python"}]
    lines = [json.dumps(r) for r in magicoder]
    hub.files["datasets/ise-uiuc/Magicoder-OSS-Instruct-75K/"
              "data-oss_instruct-decontaminated.jsonl"] = "\n".join(lines + ["{"]).encode()
    starcoder = [{"instruction": q, "response": fence(a)} for q, a in clean[15:]] + [
        {"instruction": "Do that: Write a python function to shift the zebras left. Thanks.",
         "response": fence("x = 7\n")},
        {"instruction": "Something of numbers.",
         "response": fence("def h(numbers, threshold):\n" + HUMANEVAL["canonical_solution"])},
        {"instruction": "Write a python function to shift the giraffes right.",
         "response": fence("giraffe = 1\n")}]
    for name, rows in (
            ("bigcode/self-oss-instruct-sc2-exec-filter-50k/data/train-00000-of-00001", starcoder),
            ("openai/openai_humaneval/openai_humaneval/test-00000-of-00001", [HUMANEVAL]),
            ("google-research-datasets/mbpp/full/test-00000-of-00001", [MBPP])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "t.parquet")
        hub.files[f"datasets/{name}.parquet"] = Path("t.parquet").read_bytes()
    status, out, err = run("prepare.py", "--instruct=magicoder,starcoder2",
                           "--source=instruct.jsonl", cwd=".")
    assert status == 0, err
    rows = [json.loads(line) for line in Path("instruct.jsonl").open()]
    assert sorted((r["instruction"], r["response"]) for r in rows) == sorted(
        clean + [("Write a python function to shift the giraffes right.", "giraffe = 1\n")])
    listed = [json.loads(line) for line in Path("instruct.jsonl.skipped.jsonl").open()]
    reasons = sorted((name.split(":")[0], reason.split(":")[0]) for name, reason in listed)
    assert reasons == sorted([
        ("magicoder", "of another language"), ("magicoder", "repeated response"),
        ("magicoder", "near duplicate"), ("magicoder", "with text of HumanEval or MBPP"),
        ("magicoder", "without code"), ("magicoder", "no problem and solution"),
        ("magicoder", "not JSON"),
        *[("starcoder2", "repeated response")] * 5,
        *[("starcoder2", "with text of HumanEval or MBPP")] * 2])
    assert "31 pairs" in out and "skipped 6: repeated response" in out


def test_near_duplicates_are_those_that_share_70_percent_of_their_runs():
    rng, is_near_duplicate, kept, wrong = random.Random(0), prepare.near_duplicate_test(), [], 0
    vocabulary = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(3000)]

    @functools.cache
    def runs(text):
        parts = text.split()
        return {tuple(parts[i:i + 5]) for i in range(len(parts) - 4)}

    def alike(a, b):
        shared = len(a & b)
        return shared >= 0.7 * (len(a) + len(b) - shared)

    for i in range(600):
        text = "write a python function that " + " ".join(rng.choices(vocabulary, k=80))
        if kept and i % 2:  # one before it, with some words changed
            parts = rng.choice(kept).split()
            for _ in range(rng.randrange(8)):
                parts[rng.randrange(5, len(parts))] = "other"
            text = " ".join(parts)
        mine = runs(text)
        truth = any(alike(mine, runs(other)) for other in kept)
        found = is_near_duplicate(text)
        assert truth or not found
        wrong += found != truth
        if not found:
            kept.append(text)
    assert wrong == 0 and 400 < len(kept) < 500


BROKEN = ["{", "[1]", '{"instruction": "x"}', '{"instruction": 5, "response": "y = 1"}',
          '{"instruction": "x", "response": ""}',
          '{"instruction": "x \\ud800", "response": "y = 1"}']


def test_rows_have_the_same_fate_everywhere(tokenizer, tmp_path):
    """What lintseq.py takes, prepare.py takes; what it skips is skipped, counted and listed."""
    pairs = [{"instruction": f"row {i}", "response": f"a = {i}\nb = 'c'"} for i in range(20)]
    rows = [json.dumps(pair) for pair in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:10] + BROKEN + [""] + rows[10:]))
    args = (f"--tokenizer={tokenizer}", "--dest=e.jsonl", "--val_fraction=0.3")
    status, out, err = call("prepare.py", "--instruct=a.jsonl", "--source=s.jsonl", *args,
                            cwd=tmp_path)
    assert status == 0 and "20 pairs" in out, err
    assert "skipped 3: no instruction and response" in out
    made = [json.loads(line) for line in (tmp_path / "s.jsonl").open()]
    assert sorted(map(str, made)) == sorted(map(str, pairs))
    listed = [json.loads(line)[0] for line in (tmp_path / "s.jsonl.skipped.jsonl").open()]
    assert listed == [f"a.jsonl:{n}" for n in range(11, 17)]
    status, out, err = run("lintseq.py", "--source=a.jsonl", "--dest=e.jsonl", "--samples=1",
                           cwd=tmp_path)
    assert status == 0, err
    with open(tmp_path / "e.jsonl", "a") as f:
        f.write("\n".join(["{", '{"source_instruction": "x"}', "", json.dumps(
            {"source_instruction": "x", "edit_path": "text"}), json.dumps(
            {"source_instruction": "x", "edit_path": []})]))
    for form, skipped in (("programs", 6), ("edits", 4)):
        status, out, err = call("prepare.py", f"--form={form}", f"--dataset={form}",
                                "--source=a.jsonl", *args, cwd=tmp_path)
        assert status == 0, err
        meta = json.loads((tmp_path / f"data/{form}/meta.json").read_text())
        assert meta["train"]["examples"] + meta["val"]["examples"] == 20 and meta["val"]["examples"]
        listed = [json.loads(line) for line in (tmp_path / f"data/{form}/skipped.jsonl").open()]
        assert sum(meta["skipped"].values()) == len(listed) >= skipped


def test_other_names_of_fields(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.FIELDS, "a.jsonl", ("ask", "say"))
    (tmp_path / "a.jsonl").write_text('{"ask": "x", "say": "y = 1"}\n')
    args = ("--instruct=a.jsonl", "--source=s.jsonl")
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 0
    row = json.loads((tmp_path / "s.jsonl").read_text())
    assert row == {"instruction": "x", "response": "y = 1"}


def test_held_out_problems_are_not_written_over_and_made_again(tmp_path):
    args = ("--instruct=family", "--family_size=30", "--family_heldout=5", "--source=s.jsonl",
            "--benchmark=b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"task_id": "mine"}\n')
    status, _, err = call("prepare.py", *args, cwd=tmp_path)
    assert status == 1 and "b.jsonl holds other problems: delete it" in err
    assert not (tmp_path / "s.jsonl").exists()
    (tmp_path / "b.jsonl").unlink()
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 0
    made = (tmp_path / "b.jsonl").read_text()
    assert made.count("\n") == 5
    for lost in ("b.jsonl", "s.jsonl"):  # the latter where a run was killed between the two
        (tmp_path / lost).unlink()
        assert call("prepare.py", *args, cwd=tmp_path)[0] == 0
        assert (tmp_path / "b.jsonl").read_text() == made and (tmp_path / "s.jsonl").is_file()
    assert "is there already" in call("prepare.py", *args, cwd=tmp_path)[1]


def test_a_tokenizer_of_no_text_is_not_written(tmp_path):
    (tmp_path / "a.txt").write_text("")
    status, _, err = call("prepare.py", "--corpora=a.txt", "--tokenizer=t.tiktoken", cwd=tmp_path)
    assert status == 1 and "no text to train a tokenizer on" in err
    assert not (tmp_path / "t.tiktoken").exists()


def test_edits_of_a_run_that_was_killed_are_no_training_data(tokenizer, tmp_path):
    row = json.dumps({"instruction": "x", "response": "y = 1\n" * 50}) + "\n"
    (tmp_path / "s.jsonl").write_text(row * 3000)
    process = start("lintseq.py", "--source=s.jsonl", "--dest=e.jsonl", "--workers=1", cwd=tmp_path)
    edits = tmp_path / "e.jsonl"
    while not edits.exists() or not edits.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    args = ("--form=edits", "--dest=e.jsonl", "--dataset=x", f"--tokenizer={tokenizer}")
    status, out, err = call("prepare.py", *args, cwd=tmp_path)
    assert status == 1 and "e.jsonl is not whole" in err and err.count("\n") == 1
    assert not (tmp_path / "data/x/meta.json").exists()
    Path(f"{edits}.state.json").unlink()  # edits from elsewhere have none
    assert call("prepare.py", *args, cwd=tmp_path)[0] == 0


def test_a_tokenizer_is_trained_on_pairs_whatever_their_responses_are(tmp_path):
    responses = ["x = 1\n", "This is no Python.", "x = " + "(" * 5000, "y = '\0'", "z = 2\n"]
    (tmp_path / "s.jsonl").write_text("".join(
        json.dumps({"instruction": f"row {i}", "response": response}) + "\n"
        for i, response in enumerate(responses)))
    status, out, err = call("prepare.py", "--form=programs", "--source=s.jsonl", "--dataset=x",
                            "--tokenizer=own.tiktoken", "--bpe_size=260", cwd=tmp_path)
    assert status == 0, err
    meta = json.loads((tmp_path / "data/x/meta.json").read_text())
    assert meta["train"]["examples"] + meta["val"]["examples"] + sum(meta["skipped"].values()) == 5


def test_markers_in_data_are_text(tokenizer, tmp_path):
    pairs = [{"instruction": f"row {i} <|endoftext|> <|diff|>",
              "response": f"a = {i}\nb = '<|diff|>'"} for i in range(20)]
    path = ["@@ -0,0 +1 @@\n+a = 1", "@@ -1,0 +2 @@\n+b = '<|endoftext|>'"]
    edits = [{"source_instruction": p["instruction"], "edit_path": path} for p in pairs]
    for name, rows in (("s", pairs), ("e", edits)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    enc = prepare.get_tokenizer(tokenizer)
    marker = enc._special_tokens[prepare.DIFF]
    for form in ("programs", "edits"):
        status, out, err = call("prepare.py", f"--form={form}", f"--dataset={form}",
                                "--source=s.jsonl", f"--tokenizer={tokenizer}", "--dest=e.jsonl",
                                "--val_fraction=0.3", cwd=tmp_path)
        assert status == 0, err
        found, folder = [], tmp_path / "data" / form
        for split, tokens in bins(folder).items():
            starts = np.load(folder / f"{split}.examples.npy")
            for (begin, response), end in zip(starts, [*starts[1:, 0], len(tokens)]):
                prompt, answer = tokens[begin:response].tolist(), tokens[response:end].tolist()
                assert prompt.count(marker) == (form == "edits") and enc.eot_token not in prompt
                assert answer.index(enc.eot_token) == len(answer) - 1
                assert answer.count(marker) == (len(path) + 1) * (form == "edits")
                found.append(enc.decode(prompt + answer))
        wanted = [f"{p['instruction']}\n{p['response']}<|endoftext|>" for p in pairs]
        if form == "edits":
            wanted = [p["instruction"] + "\n<|diff|>" + "".join(e + "\n<|diff|>" for e in path)
                      + "\n<|diff|><|endoftext|>" for p in pairs]
        assert sorted(found) == sorted(wanted)


def test_instructions_then_edits_in_the_order_of_the_readme(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "x", "response": "y = 1\nz = 2"}))
    args = ("--instruct=a.jsonl", "--source=s.jsonl", "--dest=e.jsonl", "--form=edits",
            f"--tokenizer={tokenizer}", "--dataset=x")
    status, out, err = run("prepare.py", *args, "--form=", cwd=tmp_path)
    assert status == 0 and (tmp_path / "s.jsonl").exists() and not err.count("prepare.py"), err
    status, out, err = call("prepare.py", *args, cwd=tmp_path)
    assert status == 1 and "next 'e.jsonl' is needed: lintseq.py makes" in err
    assert run("lintseq.py", "--source=s.jsonl", "--dest=e.jsonl", cwd=tmp_path)[0] == 0
    status, out, err = call("prepare.py", *args, cwd=tmp_path)
    assert status == 0 and "val: 0 tokens, 0 examples" in out, err
    status, out, err = call("prepare.py", *args[:-1], "--dataset=y", "--max_tokens=3", cwd=tmp_path)
    assert status == 1 and "nothing to train on" in err
    assert not (tmp_path / "data/y/meta.json").exists()
