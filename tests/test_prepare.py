"""prepare.py: downloads from a hub that misbehaves, corpora of every format, kill -9, ranks, instruction data."""
import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT, run

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet


class Hub:
    """The Hugging Face hub on 127.0.0.1: listings in pages, redirects to another host for the contents, and faults."""

    def __init__(self):
        self.files, self.requests, self.sent, self.faults = {}, [], {}, {}
        self.token, self.ranges, self.pause, self.sizes = None, True, 0.0, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                path, _, query = self.path.partition("?")
                hub.requests.append((path, dict(self.headers)))
                fault = (hub.faults.get(path) or [None]).pop(0)
                if isinstance(fault, int):
                    return self.answer(fault, Retry_After=0)
                if not path.startswith("/cdn/") and hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(403 if "Authorization" in self.headers else 401, b"gated")
                if listing := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/main/?(.*)", path):
                    kind, repo, folder = listing.groups()
                    prefix = f"{kind}/{repo}/" + (folder + "/" if folder else "")
                    names = sorted(n for n in hub.files if n.startswith(prefix) and "/" not in n[len(prefix):])
                    if not names:
                        return self.answer(404)
                    at = int(query.partition("cursor=")[2] or 0)
                    rows = [hub.row(n, n[len(f"{kind}/{repo}/"):]) for n in names[at:at + 2]]
                    link = {"Link": f'<{hub.url}{path}?cursor={at + 2}>; rel="next"'} if at + 2 < len(names) else {}
                    return self.answer(200, json.dumps([{"type": "directory", "path": "x", "oid": "0", "size": 0}] + rows
                                                       ).encode(), **link)
                if path.startswith("/cdn/"):
                    name = path[5:]
                    data, status, headers = hub.files[name], 200, {}
                    start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if hub.ranges else None
                    if start:
                        start = int(start[1])
                        if start >= len(data):
                            return self.answer(416)
                        status, headers = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                        data = data[start:]
                    if fault == "corrupt":
                        data = bytes([data[0] ^ 1]) + data[1:]
                    self.send_response(status)
                    for key, value in {"Content-Length": len(data), **headers}.items():
                        self.send_header(key, str(value))
                    self.end_headers()
                    data = data[:len(data) // 2] if fault == "drop" else data
                    for i in range(0, len(data), 1 << 16):
                        self.wfile.write(data[i:i + (1 << 16)])
                        hub.sent[name] = hub.sent.get(name, 0) + len(data[i:i + (1 << 16)])
                        time.sleep(hub.pause)
                    if fault == "drop":
                        self.close_connection = True
                    return
                name = re.sub(r"^/(datasets/)?([^/]+/[^/]+)/resolve/main/", lambda m: (m[1] or "models/") + m[2] + "/", path)
                if name not in hub.files:
                    return self.answer(404)
                return self.answer(302, Location=f"http://localhost:{hub.port}/cdn/{name}")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients that are killed
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def row(self, name, path):
        data, size = self.files[name], self.sizes.get(name, len(self.files[name]))
        if len(data) < 1000:  # kept in git itself
            return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        return {"type": "file", "path": path, "size": size, "oid": "0" * 40,
                "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(prepare, "PAUSE", 0.01)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.tiktoken"
    texts = [p.read_text() for p in sorted(ROOT.glob("*.py"))]
    prepare.train_tokenizer(path, texts, 600)
    return str(path)


def parquet(path, column, texts, kind=None, **kwargs):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, kind)}), path, **kwargs)


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


# -- Downloads --------------------------------------------------------------------------------------------------------

def test_download_through_faults_and_never_twice(hub):
    for i in range(7):
        hub.files[f"datasets/a/b/data/{i}.bin"] = noise(200_000 + i if i else 500, i)
    cdn = "/cdn/datasets/a/b/data/"
    hub.faults = {"/api/datasets/a/b/tree/main/data": [503, None, 429], cdn + "1.bin": ["drop", "drop"], cdn + "2.bin": [500, 429],
                  cdn + "3.bin": ["corrupt"], "/datasets/a/b/resolve/main/data/4.bin": [502, 504], cdn + "5.bin": ["drop"] * 4}
    paths = prepare.hub_files("a/b", "data")
    assert [p.name for p in paths] == [f"{i}.bin" for i in range(7)]  # four pages of the listing
    for p in paths:
        assert p.read_bytes() == hub.files[f"datasets/a/b/data/{p.name}"]
    assert hub.sent["datasets/a/b/data/1.bin"] <= 200_001 + 2 * 65_536  # the rest, by Range, not all of it
    assert hub.sent["datasets/a/b/data/3.bin"] == 400_006  # the checksum was wrong
    assert not list(Path("data").rglob("*.part"))
    count = len(hub.requests)
    assert prepare.hub_files("a/b", "data") == paths and len(hub.requests) == count
    paths[3].unlink()
    prepare.hub_files("a/b", "data")
    assert len(hub.requests) == count + 2 and hub.sent["datasets/a/b/data/6.bin"] == 200_006


def test_a_server_without_ranges_and_one_that_never_recovers(hub):
    hub.files["datasets/a/b/x.parquet"] = noise(300_000)
    hub.ranges = False
    hub.faults["/cdn/datasets/a/b/x.parquet"] = ["drop"]
    path, = prepare.hub_files("a/b", "x.parquet")
    assert path.read_bytes() == noise(300_000)
    hub.files["datasets/a/c/y.bin"] = noise(300_000, 1)
    hub.faults["/cdn/datasets/a/c/y.bin"] = ["drop"] * 40
    with pytest.raises(ConnectionError, match="the same command goes on"):
        prepare.hub_files("a/c", "y.bin")
    hub.faults["/cdn/datasets/a/c/y.bin"] = ["corrupt"] * 40
    with pytest.raises(ConnectionError, match="checksum"):
        prepare.hub_files("a/c", "y.bin")
    assert not Path("data/hub/datasets/a/c/y.bin").exists()
    with pytest.raises(FileNotFoundError, match="404"):
        prepare.hub_files("a/nothing", "y.bin")


def test_gated_data_says_what_to_do_and_the_token_stays_with_the_hub(hub, tokenizer, monkeypatch):
    hub.files["datasets/bigcode/the-stack/data/python/0.parquet"] = noise(2000)
    hub.token = "hf_secret"
    status, out, err = run("prepare.py", "--corpora=the-stack", f"--tokenizer={tokenizer}", "--dataset=x", cwd=".")
    assert status == 1 and err.count("\n") == 1 and "Traceback" not in err
    assert f"401: accept the terms on {hub.url}/datasets/bigcode/the-stack and set HF_TOKEN" in err
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(FileNotFoundError, match="403: accept the terms"):
        prepare.hub_files("bigcode/the-stack", "data/python")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    assert len(prepare.hub_files("bigcode/the-stack", "data/python")) == 1
    assert all("Authorization" not in headers for path, headers in hub.requests if path.startswith("/cdn/"))
    assert sum(path.startswith("/cdn/") for path, _ in hub.requests) == 1


def test_a_killed_download_goes_on(hub):
    size = 6_000_000
    hub.files["datasets/a/b/d/big.bin"] = noise(size)
    hub.pause = 0.02  # 92 pieces: two seconds
    code = "import prepare; prepare.hub_files('a/b', 'd')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = Path("data/hub/datasets/a/b/d/big.bin.part")
    deadline = time.time() + 30
    while not (part.exists() and part.stat().st_size > 1_000_000) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had, before = part.stat().st_size, hub.sent["datasets/a/b/d/big.bin"]
    assert 0 < had < size
    hub.pause = 0
    path, = prepare.hub_files("a/b", "d")
    assert path.read_bytes() == noise(size)
    assert any(headers.get("Range") == f"bytes={had}-" for _, headers in hub.requests)


def test_a_full_disk_is_noticed_before_it_is_full(hub, tokenizer):
    name = "datasets/HuggingFaceFW/fineweb/sample/10BT/0.parquet"
    hub.files[name] = noise(2000)
    hub.sizes[name] = 10 ** 16
    status, out, err = run("prepare.py", "--corpora=fineweb", f"--tokenizer={tokenizer}", "--dataset=x", cwd=".")
    assert status == 1 and re.search(r"needs about 10,000,000.00 GB, and .* GB free", err) and err.count("\n") == 1
    assert not any(path.startswith("/cdn/") for path, _ in hub.requests)


# -- Corpora ----------------------------------------------------------------------------------------------------------

def test_every_format_and_what_is_broken_in_it(hub, tokenizer, tmp_path):
    enc, place = prepare.get_tokenizer(tokenizer), tmp_path / "corpus"
    place.mkdir()
    good = {f"document {i}: " + "naïve café 東京 🙂\r\n\tx = 1  \n" * i for i in range(1, 41)}
    g = sorted(good, key=len)
    (place / "a.py").write_text(g[0], newline="")
    (place / "a_latin.py").write_bytes("café".encode("latin-1"))
    (place / "empty.txt").write_text("")
    (place / "b.txt").write_text(g[1], newline="")
    rows = [json.dumps({"text": t}) for t in g[2:8]] + [json.dumps({"content": g[8]})]
    broken = ["{", "[1]", '{"other": 1}', '{"text": 5}', '{"text": ""}', '{"text": "\\ud800"}', "", "[" * 100_000]
    (place / "c.jsonl").write_text("\n".join(x for pair in zip(rows, broken) for x in pair) + "\n" + broken[7])
    (place / "c_bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' + json.dumps({"text": g[9]}).encode())  # no last newline
    with gzip.open(place / "d.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": t}) for t in g[10:15]))
    cut = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in g[15:18]).encode() + noise(50_000).hex().encode())
    (place / "e_cut.jsonl.gz").write_bytes(cut[:-2000])
    parquet(place / "f.parquet", "text", g[18:30], row_group_size=5)
    parquet(place / "g.parquet", "content", g[30:40] + [None, ""], pyarrow.large_string(), row_group_size=3)
    parquet(place / "h.parquet", "text", [g[0].encode(), b"caf\xe9", b"fine"], pyarrow.binary())
    whole = (place / "f.parquet").read_bytes()
    (place / "i_cut.parquet").write_bytes(whole[:-100])
    parquet(place / "j.parquet", "label", ["no text"])
    damaged = bytearray(whole)
    damaged[20:200] = noise(180)
    (place / "k.parquet").write_bytes(damaged)

    status, out, err = run("prepare.py", f"--corpora={place}", f"--tokenizer={tokenizer}", "--dataset=x", "--val_fraction=0.25", cwd=".")
    assert status == 0, err
    meta = json.loads(Path("data/x/meta.json").read_text())
    found = texts_of(Path("data/x"), enc)
    normal = lambda t: t.replace("\r\n", "\n")  # files are read as text
    everything = found["train"] + found["val"]
    assert set(map(normal, everything)) >= set(map(normal, good)) and "fine" in everything
    for split in found:
        assert meta[split] == {"tokens": len(bins(Path("data/x"))[split]), "documents": len(found[split])}
        assert all(prepare.held_out(t, 0.25) == (split == "val") for t in found[split])
    assert len(found["val"]) > 3
    listed = [json.loads(line) for line in Path("data/x/skipped.jsonl").open()]
    reasons = {}
    for name, reason in listed:
        reasons.setdefault(reason, []).append(Path(name.split(", ")[0]).name.split(":")[0])
    assert sorted(reasons.pop("not UTF-8")) == ["a_latin.py", "c.jsonl", "c_bytes.jsonl", "h.parquet"]
    assert sorted(reasons.pop("empty")) == ["c.jsonl", "empty.txt", "g.parquet"]
    assert reasons.pop("no text") == ["g.parquet"] and reasons.pop("broken row") == ["c.jsonl"] * 5
    assert {n for names in reasons.values() for n in names} == {"e_cut.jsonl.gz", "i_cut.parquet", "j.parquet", "k.parquet"}
    assert all(reason.startswith("unreadable ") for reason in reasons)
    assert sum(meta["skipped"].values()) == len(listed) and "unreadable parquet" in out
    assert not Path("data/x/shards").exists()


def test_shards_of_a_jsonl_lose_nothing(monkeypatch, tmp_path):
    texts = [f"{i} " + "x" * random.Random(i).randrange(300) for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for size in (50, 64, 333, 10 ** 6):  # rows longer than a shard too
        monkeypatch.setattr(prepare, "SHARD", size)
        assert [t for _, t in prepare.documents(str(path))] == texts
    monkeypatch.setattr(prepare, "LONGEST", 100)
    kept = [t for t in texts if len(json.dumps({"text": t})) + 1 <= 100]
    results = [t for span in prepare.spans(path) for _, t in prepare.read_span(*span[:3])]
    assert [t for t in results if isinstance(t, str)] == kept and 0 < len(kept) < 200
    assert sum("longer than" in str(t) for t in results if not isinstance(t, str)) == 200 - len(kept)


def test_long_texts_get_the_tokens_of_one_encoding(tokenizer):
    enc = prepare.get_tokenizer(tokenizer)
    text = "\n".join(p.read_text() for p in sorted(ROOT.glob("*.py"))) * 8
    assert len(text) > 1_000_000
    parts = list(prepare.pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 1 << 18 and len(parts) > 4
    assert [t for p in parts for t in enc.encode_ordinary(p)] == enc.encode_ordinary(text)
    for odd in (" " * 3_000_000, "a" * 1_000_000, " \n" * 500_000 + "x", "x\n" + "\t" * 500_000):  # the first stops tiktoken
        parts = list(prepare.pieces(odd))
        assert "".join(parts) == odd and enc.decode([t for p in parts for t in enc.encode_ordinary(p)]) == odd


SMALL_SHARDS = "import prepare; prepare.SHARD = 1 << 17; prepare.main()"


def start_small(*args, env=()):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict(env)}
    return subprocess.Popen([sys.executable, "-c", SMALL_SHARDS, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_kill_9_workers_and_ranks_change_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [t for _, t in prepare.documents("stdlib") if t][:220]
    Path("a").mkdir()
    parquet("a/0.parquet", "text", texts[:80], row_group_size=10)
    Path("a/1.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[80:200]))
    for i, t in enumerate(texts[200:]):
        Path(f"a/2{i:02}.py").write_text(t)
    args = ("--corpora=a", f"--tokenizer={tokenizer}", "--val_fraction=0.1")
    plain = start_small("--dataset=plain", "--workers=1", *args)
    out, _ = plain.communicate()
    assert plain.returncode == 0, out
    assert int(re.search(r"in (\d+) shards", out)[1]) > 15
    wanted = bins(Path("data/plain"))
    assert len(wanted["train"]) > 500_000 and len(wanted["val"]) > 10_000

    killed, shards = 0, Path("data/killed/shards")
    while killed < 3:  # at different places; the last run goes through
        process = start_small("--dataset=killed", "--workers=2", *args)
        goal = 2 + 5 * killed
        while process.poll() is None and len(list(shards.glob("*.json"))) <= goal:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()  # its workers hold the pipe: this waits for them to end too
        killed += 1
    stamps = {p: p.stat().st_mtime_ns for p in shards.glob("0*.json")}
    process = start_small("--dataset=killed", "--workers=2", *args)
    while process.poll() is None:
        for p in stamps:
            assert not p.exists() or p.stat().st_mtime_ns == stamps[p]  # not done again
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[0]
    for split in wanted:
        assert np.array_equal(bins(Path("data/killed"))[split], wanted[split])
    assert Path("data/killed/meta.json").read_text() == Path("data/plain/meta.json").read_text()

    ranks = [start_small("--dataset=ranks", "--workers=1", *args, env={"RANK": str(r), "WORLD_SIZE": "2"}) for r in (0, 1)]
    for process in ranks:
        out, _ = process.communicate()
        assert process.returncode == 0, out
    for split in wanted:
        assert np.array_equal(bins(Path("data/ranks"))[split], wanted[split])


def test_joining_can_be_killed_between_any_two_writes(tokenizer, tmp_path, monkeypatch):
    """The join is stopped after each of its steps in turn, and begun again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "_enc", prepare.get_tokenizer(tokenizer), raising=False)  # as in a worker
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 30}) + "\n" for i in range(60)))
    spans = [("a.jsonl", at, at + 4000, 4000) for at in range(0, os.path.getsize("a.jsonl"), 4000)]
    stems = [Path(f"data/x/shards/{i:06}") for i in range(len(spans))]
    bad = KeyboardInterrupt
    wanted, steps = None, 0
    for stop in range(100):
        if stop == 0 or wanted is not None:
            stems[0].parent.mkdir(parents=True, exist_ok=True)
            for stem, span in zip(stems, spans):
                prepare.tokenize((str(stem), [span], 0.3))
        left = [stop or 10 ** 6]

        def limited(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise bad
                return function(*args, **kwargs)
            return call
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (prepare.shutil, "copyfileobj"), (prepare.shutil, "rmtree")):
                patch.setattr(owner, name, limited(getattr(owner, name)))
            try:
                prepare.join(Path("data/x"), stems, {})
                finished = True
            except bad:
                finished = False
        if not finished:
            steps += 1
            prepare.join(Path("data/x"), stems, {}) if stems[0].parent.exists() else None
        result = [Path(f"data/x/{split}.bin").read_bytes() for split in ("train", "val")]
        wanted = wanted or result
        assert result == wanted and len(result[1]) > 100
        prepare.shutil.rmtree("data/x")
        if finished and stop:
            break
    assert steps > 4 * len(spans)


PEAK = """import prepare, resource
prepare.main()
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000)"""


def test_memory_is_bounded_and_another_plan_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "def f(x):\n    return x + 1  # some words that fill the line\n"
    Path("a").mkdir()
    with open("a/long.txt", "w") as f:
        f.writelines(line * 1000 for _ in range(650))  # 39 MB
    parquet("a/long.parquet", "text", [line * 200_000])  # a document of 12 MB
    with open("a/longer.jsonl", "w") as f:  # a row of 70 MB, and one in characters of four bytes
        f.write('{"text": "' + "x " * 35_000_000 + '"}\n' + json.dumps({"text": "\U0001f642 " + "x" * 10_000_000}, ensure_ascii=False))
    parquet("a/longest.parquet", "text", ["first", "x " * 400_000_000, "last"])  # a page of 800 MB
    args = [f"--tokenizer={tokenizer}", "--dataset=x", "--corpora=a"]
    process = subprocess.run([sys.executable, "-c", PEAK, *args, "--workers=2"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    meta = json.loads(Path("data/x/meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] > 3
    listed = [json.loads(row) for row in Path("data/x/skipped.jsonl").open()]
    assert sorted((Path(name.split(", ")[0]).name, reason[:18]) for name, reason in listed) == [
        ("longer.jsonl", "longer than 64 MB"), ("longest.parquet", "unreadable parquet")]
    assert int(process.stdout.split("peak ")[1]) < 2000  # MB, of the largest worker
    Path("data/x/meta.json").unlink()
    Path("data/x/shards").mkdir()
    Path("data/x/shards/plan.json").write_text("{}")
    status, out, err = run("prepare.py", *args, cwd=".")
    assert status == 1 and "begun with other corpora" in err


def test_tokenizers_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    for key, value in (("TIKTOKEN_CACHE_DIR", str(tmp_path / "none")), ("HTTPS_PROXY", "http://127.0.0.1:9"), ("https_proxy", "http://127.0.0.1:9")):
        monkeypatch.setenv(key, value)
    for name, message in (("p50k_base", "tiktoken fetches it from the network at its first use"), ("p50k_bas", "p50k_base, "),
                          ("none.json", "No such file")):
        status, out, err = run("prepare.py", "--corpora=a.txt", f"--tokenizer={name}", "--dataset=x", cwd=".")
        assert status == 1 and err.startswith(f"prepare.py: tokenizer={name}: ") and message in err and err.count("\n") == 1, err


def test_a_tokenizer_too_large_for_16_bits(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = Path(tokenizer).read_text()
    extra = "".join(f"{prepare.base64.b64encode(b'%6d' % i).decode()} {i}\n" for i in range(len(lines.splitlines()), 65_600))
    Path("large.tiktoken").write_text(lines + extra)
    Path("a.txt").write_text("text")
    status, out, err = run("prepare.py", "--corpora=a.txt", "--tokenizer=large.tiktoken", "--dataset=x", cwd=".")
    assert status == 1 and "65,602 entries" in err and err.count("\n") == 1


# -- Instruction data -------------------------------------------------------------------------------------------------

def test_code_of_markdown():
    assert prepare.code_of("Here:\n```python\nx = 1\n```\nand\n```py\ny = 2\n```\n```bash\nls\n```") == "x = 1\ny = 2\n"
    assert prepare.code_of("1. do\n   ```Python title=a\n   def f():\n       return 1\n   ```\n") == "def f():\n    return 1\n"
    assert prepare.code_of("```\nx = 1\n```") == "x = 1\n"
    assert prepare.code_of("```python\nx = 1") == "x = 1\n"  # cut off
    assert prepare.code_of("def f():\n    return 1") == "def f():\n    return 1\n"
    assert prepare.code_of("I cannot do that.") == prepare.code_of("```rust\nfn main() {}\n```") == ""


def test_instruct_is_clean(hub):
    def problem(i):
        rng = random.Random(i)
        names = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(40)]
        return (f"Write a function {names[0]} that takes {' and '.join(names[1:12])}.",
                f"def {names[0]}({', '.join(names[1:5])}):\n" + "".join(f"    {a} = {b} + {i}\n" for a, b in zip(names[12:], names[5:])))
    fence = "Sure!\n```python\n{}```\nThis works because of reasons.".format
    clean = [problem(i) for i in range(30)]
    humaneval = {"task_id": "HumanEval/0", "prompt": 'def has_close_elements(numbers):\n    """ Check if in given list of numbers, '
                 'are any two numbers closer to each other than given threshold.\n    """\n',
                 "canonical_solution": "    for idx, elem in enumerate(numbers):\n        for idx2, elem2 in enumerate(numbers):\n"
                 "            if idx != idx2:\n                distance = abs(elem - elem2)\n                if distance < threshold:\n"
                 "                    return True\n\n    return False\n"}
    mbpp = {"task_id": 11, "text": "Write a python function to shift the zebras left.", "code": "def zebra(a):\n    return a[::-1]"}
    near = clean[3][1].replace(" + 3", " + 4", 1)
    magicoder = [{"lang": "python", "problem": q, "solution": fence(a)} for q, a in clean[:20]] + [
        {"lang": "rust", "problem": "q", "solution": "```rust\nfn main() {}\n```"},
        {"lang": "python", "problem": "another question", "solution": fence(clean[0][1])},  # an exact repeat
        {"lang": "python", "problem": clean[3][0], "solution": fence(near)},
        {"lang": "python", "problem": "Please, CHECK if in given list of numbers, are any two numbers closer to each other.",
         "solution": fence("def g(n):\n    return n\n")},
        {"lang": "python", "problem": "Explain", "solution": "No code here."}, {"lang": "python"}]
    lines = [json.dumps(r) for r in magicoder]
    hub.files["datasets/ise-uiuc/Magicoder-OSS-Instruct-75K/data-oss_instruct-decontaminated.jsonl"] = "\n".join(lines + ["{"]).encode()
    starcoder = [{"instruction": q, "response": fence(a)} for q, a in clean[15:]] + [
        {"instruction": "Do that: Write a python function to shift the zebras left. Thanks.", "response": fence("x = 7\n")},
        {"instruction": "Something of numbers.", "response": fence("def h(numbers, threshold):\n" + humaneval["canonical_solution"])},
        {"instruction": "Write a python function to shift the giraffes right.", "response": fence("giraffe = 1\n")}]
    for name, rows in (("bigcode/self-oss-instruct-sc2-exec-filter-50k/data/train-00000-of-00001", starcoder),
                       ("openai/openai_humaneval/openai_humaneval/test-00000-of-00001", [humaneval]),
                       ("google-research-datasets/mbpp/full/test-00000-of-00001", [mbpp])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "t.parquet")
        hub.files[f"datasets/{name}.parquet"] = Path("t.parquet").read_bytes()
    status, out, err = run("prepare.py", "--instruct=magicoder,starcoder2", "--source=instruct.jsonl", cwd=".")
    assert status == 0, err
    rows = [json.loads(line) for line in Path("instruct.jsonl").open()]
    assert sorted((r["instruction"], r["response"]) for r in rows) == sorted(
        clean + [("Write a python function to shift the giraffes right.", "giraffe = 1\n")])
    first, second = [line for line in out.splitlines() if "left out" in line]
    assert "magicoder: 20 pairs" in first and "starcoder2: 11 pairs" in second
    for part in ("1 of another language", "1 repeats", "1 near duplicates", "1 with text of HumanEval", "1 without code", "2 broken rows"):
        assert part in first
    assert "5 repeats" in second and "2 with text of HumanEval" in second
