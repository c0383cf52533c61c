"""What the tests share: scripts as users start them, small real data, a hub on 127.0.0.1."""
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config  # noqa: E402
import torch  # noqa: E402
torch.set_num_threads(2)
GPUS = torch.cuda.device_count()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every machine tests the same; test_gpu.py the rest


@pytest.fixture
def gpu(monkeypatch):
    """The scripts that the test starts see the GPUs."""
    if not GPUS:
        pytest.skip("no CUDA GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


def start(script, *args, cwd, ranks=1, **kwargs):
    """A script as a user starts it, in the folder `cwd`; with ranks > 1 under torchrun."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        launcher + [str(ROOT / script), *map(str, args)], cwd=cwd, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(script, *args, cwd, ranks=1):
    """(exit status, standard output, standard error) of a script."""
    process = start(script, *args, cwd=cwd, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def log_lines(folder):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def call(script, *args, cwd):
    """run() in this process, for what a script refuses or does in a moment: to start another takes
    seconds."""
    main = importlib.import_module(script.removesuffix(".py")).main
    status, out, err, there, argv = 0, io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(cwd)
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config.run(main)
    except SystemExit as e:
        status = e.code
    finally:
        os.chdir(there)
        sys.argv = argv
        for number, handler in handlers.items():  # train.py's
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def response(*edits):
    """What a model writes, as published: each edit behind a marker of its own (the first one ends
    the prompt), two bare markers at the end, end-of-text."""
    return "\n<|diff|>".join(edits) + 2 * "\n<|diff|>" + "<|endoftext|>"


def stop_servers():
    """End the sandbox's idle servers: the next program starts one."""
    import evaluate
    for servers in evaluate._idle:
        while servers:
            servers.pop().communicate()  # end of file: it ends by itself


def skip_without_namespaces():
    """Skip a module where the kernel lets nobody make namespaces. Where util-linux's unshare can,
    evaluate.py has to: its RuntimeError is a failure."""
    import evaluate
    try:
        evaluate.run_program("pass")
    except RuntimeError as reason:
        probe = "unshare -r --mount --pid --net --ipc --fork mount -t tmpfs none /tmp"
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(probe.split(), capture_output=True).returncode == 0:
                raise
        pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with small real data: data/text from some standard library files, data/edits and
    data/programs from 60 problems of the family, one tokenizer."""
    import argparse, ast, base64, calendar, csv, difflib, heapq, inspect, shlex, string, textwrap
    from config._demo_problems import family_compositions, family_problem
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "text").mkdir()
    for module in (argparse, ast, base64, calendar, csv, difflib, heapq, shlex, string, textwrap):
        (folder / "text" / f"{module.__name__}.py").write_text(inspect.getsource(module))
    compositions = random.Random(0).sample(family_compositions(), 60)
    rows = [family_problem(c, random.Random(i)) for i, c in enumerate(compositions)]
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({**r, "task_id": f"t/{i}"}) + "\n" for i, r in enumerate(rows)))
    (folder / "instruct.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ("--tokenizer=tiny.tiktoken", "--bpe_size=510", "--val_fraction=0.2",
              "--source=instruct.jsonl", "--dest=edits.jsonl")
    for script, *args in (
            ("prepare.py", "--dataset=text", "--corpora=text", *common),
            ("lintseq.py", "--source=instruct.jsonl", "--dest=edits.jsonl", "--samples=2"),
            ("prepare.py", "--dataset=edits", "--form=edits", *common),
            ("prepare.py", "--dataset=programs", "--form=programs", *common)):
        status, out, err = run(script, *args, cwd=folder)
        assert status == 0, (script, out, err)
    return folder


class Hub:
    """The Hugging Face hub on 127.0.0.1, as the library huggingface_hub asks it: listings in pages,
    redirects to another host for the contents, and faults.

    files: {"datasets/owner/name/path": bytes}; faults: {path of a request: what to answer first,
    statuses, None for no fault, or "drop" in the middle}; token: what a request needs; requests:
    (method, path, headers) that came; sent: {file: bytes that went out}."""
    COMMIT = "c0ffee" * 6 + "c0ff"

    def __init__(self):
        self.files, self.faults, self.requests, self.sent = {}, {}, [], {}
        self.token, self.pause, self.sizes = None, 0.0, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients that are killed
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path, _, query = urllib.parse.unquote(request.path).partition("?")
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.command, path, headers))
        fault = (self.faults.get(path) or [None]).pop(0)
        authorization = request.headers.get("Authorization")
        if isinstance(fault, int):
            return self.reply(request, fault, Retry_After=0)
        if fault and not path.startswith("/cdn/"):
            request.close_connection = True
            return
        if path.startswith("/cdn/"):
            return self.send_file(request, path[5:], fault)
        if self.token and authorization != f"Bearer {self.token}":
            return self.reply(request, 403 if authorization else 401, X_Error_Code="GatedRepo")
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(/revision/\w+)?", path):
            if any(name.startswith("/".join(found.groups()[:2]) + "/") for name in self.files):
                body = {"id": found[2], "sha": self.COMMIT, "siblings": []}
                return self.reply(request, 200, body)
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/\w+/?(.*)", path):
            return self.list_folder(request, *found.groups(), query)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.*)", path):
            name = (found[1] or "models/") + found[2] + "/" + found[3]
            if name in self.files:
                return self.reply(
                    request, 302, X_Repo_Commit=self.COMMIT, X_Linked_Size=len(self.files[name]),
                    X_Linked_Etag=f'"{hashlib.sha256(self.files[name]).hexdigest()}"',
                    Location=f"http://localhost:{self.port}/cdn/{name}")
        self.reply(request, 404, X_Error_Code="EntryNotFound")

    def reply(self, request, status, body=None, **headers):
        data = json.dumps(body).encode() if body is not None else b""
        request.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            request.send_header(name.replace("_", "-"), str(value))
        request.end_headers()
        request.wfile.write(data)

    def list_folder(self, request, kind, repo, folder, query):
        prefix = f"{kind}/{repo}/" + (folder + "/" if folder else "")
        names = sorted(n for n in self.files if n.startswith(prefix)
                       and ("recursive=True" in query or "/" not in n[len(prefix):]))
        query, _, at = query.partition("&cursor=")
        at = int(at or 0)
        rows = [{"type": "file", "path": name[len(f"{kind}/{repo}/"):], "oid": "0" * 40,
                 "size": self.sizes.get(name, len(self.files[name]))} for name in names[at:at + 2]]
        link = f'<{self.url}{request.path.partition("?")[0]}?{query}&cursor={at + 2}>; rel="next"'
        rows.append({"type": "directory", "path": "x", "oid": "0" * 40})
        self.reply(request, 200, rows, **({"Link": link} if at + 2 < len(names) else {}))

    def send_file(self, request, name, fault):
        data = self.files[name]
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(start[1]) if start else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        data = data[start:start + (len(data) - start) // 2] if fault == "drop" else data[start:]
        for i in range(0, len(data), 1 << 16):
            request.wfile.write(data[i:i + (1 << 16)])
            self.sent[name] = self.sent.get(name, 0) + len(data[i:i + (1 << 16)])
            time.sleep(self.pause)
        request.close_connection = fault == "drop"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process and the scripts it starts ask, an empty cache, an empty folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = Hub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in (  # what the library has read from the environment in this process
            ("ENDPOINT", hub.url), ("HF_HUB_CACHE", str(tmp_path / "hf/hub")),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(constants, name, value)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="session")
def library():
    """The texts of this Python's standard library."""
    import prepare
    return [text for _, text in prepare.read_documents("stdlib")]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The path of a small .tiktoken file, trained on the scripts."""
    import prepare
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.tiktoken"
    prepare.train_tokenizer(path, [p.read_text() for p in sorted(ROOT.glob("*.py"))], 600)
    return str(path)


@pytest.fixture(scope="session")
def neox(tmp_path_factory, library):
    """A tokenizer.json made as GPT-NeoX's and OLMo's: NFC, ByteLevel, runs of spaces and masks as
    added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["|||IP_ADDRESS|||", "<|padding|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = ["東京 café naïve 🙂 Ελληνικά русский"] * 50
    t.train_from_iterator(library[:250] + letters, trainer)
    t.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    t.add_tokens([tokenizers.AddedToken(m, normalized=False)
                  for m in ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||")])
    t.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("neox")
    t.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"][0]["special"] = False  # the mask at 0 is no special token in OLMo's
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder
