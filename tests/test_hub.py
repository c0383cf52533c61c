"""prepare.py and a hub that misbehaves: faults, gates, kill -9, ranks, a full disk, no library."""
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run, start
from test_prepare import texts_of

import prepare

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

pytest.importorskip("huggingface_hub")
FINEWEB = "datasets/HuggingFaceFW/fineweb/sample/10BT/"
STACK = "datasets/bigcode/the-stack/data/python/"


def parquet(column, texts):
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), table, compression="none")
    return table.getvalue()


def texts(n, seed=0, words=40):
    rng = random.Random(seed)
    return ["".join(rng.choices("etaoin shrdlu\n", k=words * 5)) for _ in range(n)]


def documents_of(folder, tokenizer):
    """The sorted documents of both bins."""
    found = texts_of(folder, prepare.get_tokenizer(tokenizer))
    return sorted(found["train"] + found["val"])


def gets(hub):
    return [path for method, path, _ in hub.requests
            if method == "GET" and path.startswith("/cdn/")]


ARGS = ("--dataset=x", "--val_fraction=0.2")


def test_downloads_go_through_faults_and_never_twice(hub, tokenizer):
    parts = [texts(5, i) for i in range(5)]
    for i, part in enumerate(parts):
        hub.files[f"{STACK}{i}.parquet"] = parquet("content", part + ["x" * 200_000])
    hub.files[f"{STACK}.gitattributes"] = b"no"
    hub.files["datasets/bigcode/the-stack/data/java/0.parquet"] = b"no"
    cdn = f"/cdn/{STACK}"
    listing = f"/api/datasets/bigcode/the-stack/tree/{hub.COMMIT}/data/python"
    hub.faults = {"/api/datasets/bigcode/the-stack": [503], listing: [503, None, "drop", 500],
                  cdn + "1.parquet": ["drop", "drop"], cdn + "2.parquet": [500, 429],
                  f"/{STACK[:-12]}/resolve/{hub.COMMIT}/data/python/3.parquet": [502, None, 504]}
    args = ("prepare.py", "--corpora=the-stack:4", f"--tokenizer={tokenizer}", *ARGS)
    status, out, err = run(*args, cwd=".")
    assert status == 0, err
    assert documents_of(Path("data/x"), tokenizer) == sorted(
        text for part in parts[:4] for text in part + ["x" * 200_000])
    assert gets(hub).count(cdn + "1.parquet") == 3 and gets(hub).count(cdn + "0.parquet") == 1
    assert not hub.faults[listing]
    assert not any(name in path for path in gets(hub) for name in ("4.parquet", ".git", "java"))
    count = len(hub.requests)
    run(*args[:-2], "--dataset=again", cwd=".")  # all of it is there: no request at all
    assert Path("data/again/meta.json").exists() and len(hub.requests) == count


def test_gated_data_says_what_to_do_and_the_token_stays_with_the_hub(hub, tokenizer, monkeypatch):
    hub.files[f"{STACK}0.parquet"] = parquet("content", texts(9))
    hub.token = "hf_secret"
    args = ("prepare.py", "--corpora=the-stack", f"--tokenizer={tokenizer}", *ARGS)
    for token, code in ((None, 401), ("hf_wrong", 403)):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        status, out, err = run(*args, cwd=".")
        assert status == 1 and err.count("\n") == 1 and f"status {code}" in err
        assert f"{hub.url}/datasets/bigcode/the-stack, accept its terms there" in err
        assert "HF_TOKEN" in err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    status, out, err = run(*args, cwd=".")
    assert status == 0, err
    sent = [headers for _, path, headers in hub.requests if path.startswith("/cdn/")]
    assert len(sent) == 1 and not any("authorization" in headers for headers in sent)


def test_what_is_not_there_and_a_server_that_never_recovers(hub, tokenizer, monkeypatch):
    for corpus, name, told in (("fineweb", tokenizer, "status 404"), (
            "a.txt", "owner/nothing", "tokenizer=owner/nothing: status 404")):
        Path("a.txt").write_text("text")
        args = ("prepare.py", f"--corpora={corpus}", f"--tokenizer={name}", *ARGS)
        status, out, err = run(*args, cwd=".")
        assert status == 1 and told in err and err.count("\n") == 1
    hub.files[f"{FINEWEB}0.parquet"] = parquet("text", texts(9))
    listing = f"/api/datasets/HuggingFaceFW/fineweb/tree/{hub.COMMIT}/sample/10BT"
    hub.faults[listing] = [403]
    status, out, err = run("prepare.py", "--corpora=fineweb", f"--tokenizer={tokenizer}", *ARGS,
                           cwd=".")
    assert status == 1 and err.count("\n") == 1 and "status 403" in err
    assert f"{hub.url}/datasets/HuggingFaceFW/fineweb, accept its terms there" in err
    hub.faults[f"/cdn/{FINEWEB}0.parquet"] = [500] * 99
    code = "import config, prepare; prepare.TRIES = 2; config.run(prepare.main)"
    with socket.create_server(("127.0.0.1", 0)) as s:  # closed: nobody answers there
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}"
    for url, corpus, page, told in (
            (hub.url, "fineweb", "HuggingFaceFW/fineweb", "500"),
            (nobody, "the-stack", "bigcode/the-stack", "refused")):
        process = subprocess.run(
            [sys.executable, "-c", code, f"--corpora={corpus}", f"--tokenizer={tokenizer}", *ARGS],
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": url}, capture_output=True,
            text=True)
        last = process.stderr.splitlines()[-1]
        assert process.returncode == 1 and "the same command goes on from here" in last
        assert told in last
        assert f"{url}/datasets/{page}" in last and "Traceback" not in process.stderr


def test_a_killed_download_goes_on_with_the_files_that_are_there(hub, tokenizer):
    for i in range(3):
        hub.files[f"{FINEWEB}{i}.parquet"] = parquet("text", texts(9, i) + ["x" * 2_000_000])
    hub.pause = 0.02  # 31 pieces a file
    args = ("prepare.py", "--corpora=fineweb", f"--tokenizer={tokenizer}", *ARGS)
    process = start(*args, cwd=".")
    deadline = time.time() + 60
    while f"{FINEWEB}1.parquet" not in hub.sent and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.pause = 0
    status, out, err = run(*args, cwd=".")
    assert status == 0, err
    assert hub.sent[f"{FINEWEB}0.parquet"] == len(hub.files[f"{FINEWEB}0.parquet"])
    assert len(documents_of(Path("data/x"), tokenizer)) == 30


def test_ranks_share_the_downloads(hub, tokenizer, monkeypatch):
    parts = [texts(9, i) for i in range(6)]
    for i, part in enumerate(parts):
        hub.files[f"{FINEWEB}{i}.parquet"] = parquet("text", part)
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        processes.append(start(
            "prepare.py", "--corpora=fineweb", f"--tokenizer={tokenizer}", *ARGS, cwd="."))
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
    assert sorted(gets(hub)) == [f"/cdn/{FINEWEB}{i}.parquet" for i in range(6)]  # each once
    assert documents_of(Path("data/x"), tokenizer) == sorted(sum(parts, []))


def test_a_full_disk_is_noticed_before_it_is_full(hub, tokenizer):
    hub.files[f"{FINEWEB}0.parquet"] = parquet("text", texts(9))
    hub.sizes[f"{FINEWEB}0.parquet"] = 10 ** 16
    args = ("prepare.py", "--corpora=fineweb", f"--tokenizer={tokenizer}", *ARGS)
    status, out, err = run(*args, cwd=".")
    assert status == 1 and "needs about 10,000,000.00 GB, and " in err and err.count("\n") == 1
    assert not gets(hub)


def test_a_models_tokenizer_comes_by_its_name(hub):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(texts(50), trainer)
    hub.files["models/owner/name/tokenizer.json"] = library.to_str().encode()
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(30)))
    args = ("prepare.py", "--corpora=a.jsonl", "--tokenizer=owner/name", *ARGS)
    status, out, err = run(*args, cwd=".")
    assert status == 0, err
    meta = json.loads(Path("data/x/meta.json").read_text())
    assert meta["tokenizer"] == "owner/name" and meta["vocab_size"] == library.get_vocab_size()
    assert len(gets(hub)) == 1
    Path("tokenizer.json").write_text(library.to_str())
    assert documents_of(Path("data/x"), "tokenizer.json") == sorted(texts(30))


@pytest.mark.parametrize("library, args", [
    ("huggingface_hub", ("--corpora=fineweb",)), ("tokenizers", ("--tokenizer=t.json",)),
    ("pyarrow", ())])
def test_a_missing_library_is_named_with_its_pip_install(tmp_path, tokenizer, library, args):
    (tmp_path / "a.parquet").write_bytes(parquet("text", texts(3)))
    (tmp_path / "t.json").write_text("{}")
    code = (f"import sys; sys.modules['{library}'] = None; import config, prepare; "
            "config.run(prepare.main)")
    process = subprocess.run(
        [sys.executable, "-c", code, "--corpora=a.parquet", f"--tokenizer={tokenizer}", *ARGS,
         *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert f"pip install {library}" in process.stderr
