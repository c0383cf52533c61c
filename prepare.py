"""Text to tokens: tokenizers, corpora, instruction data, and the memmapped bins that train.py reads.

    python prepare.py config/demo.py             # the demo: a tokenizer, the standard library, small problems
    python prepare.py config/demo_edits.py       # after lintseq.py: edit sequences (form = "edits") into a bin
    python prepare.py config/demo_programs.py    # whole programs (form = "programs"), the paper's baseline
    python prepare.py config/150m.py             # FineWeb and The Stack: downloads, then tokens, on all cores
    python prepare.py --export=out-150m          # a checkpoint as a Hugging Face model, in out-150m/hf

Writes data/<dataset>/{train,val}.bin, raw little-endian uint16 tokens without a header, and meta.json: tokenizer,
counts, sources, what was skipped and why. Instruction data adds {train,val}.examples.npy, int64 (n, 2): where each
example and where its response starts. What is there already is not made again; every file appears whole or not at all;
a run that was killed goes on. Several machines that share a file system each take a share (`torchrun`, `srun`).
Left out: downloading and tokenizing at once, data that does not lie on a shared file system, streaming.
"""
import ast
import base64
import fcntl
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import config
import lintseq

DATA = Path("data")
EOT, DIFF = "<|endoftext|>", lintseq.DIFF
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Settings:
    dataset = "demo"  # the folder under data/ that is written
    tokenizer = "p50k_base"  # a tiktoken encoding, a .tiktoken file (trained here if missing) or a Hugging Face model
    bpe_size = 1024  # entries of a tokenizer that is trained here
    corpora = ()  # "stdlib", "fineweb", "the-stack" ("the-stack:9": 9 files), .py .txt .jsonl[.gz] .parquet, folders
    instruct = ()  # "stdlib", "family", "magicoder", "starcoder2", or .jsonl files of `instruction`, `response`
    source = ""  # the JSONL of instruction and response that `instruct` becomes; lintseq.py reads it
    dest = ""  # the JSONL of edit sequences that lintseq.py writes
    form = ""  # tokenize instruction data: "edits" (dest) or "programs" (source)
    benchmark = ""  # where the family's held-out problems go; evaluate.py scores them
    family_size = 10_000  # problems of the procedural family to train on
    family_heldout = 200  # and held out
    val_fraction = 0.01  # of the documents or examples, chosen by a hash of their text
    max_tokens = 1024  # longest example of instruction data, tokens; longer ones are left out and counted
    seed = 1337  # of the family and of the order of examples
    workers = 0  # processes that tokenize; 0: one a CPU
    export = ""  # a folder with ckpt.pt, to be written as a Hugging Face model into its hf/
    results = "out-eval"  # evaluate.py's folder, whose scores go into the model card


def die(message):
    print(f"prepare.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def write_whole(path, data):
    """Write bytes to a temporary file beside `path`, flush, rename: a crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{RANK}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


# -- Tokenizers -------------------------------------------------------------------------------------------------------

# GPT-4's pattern, changed for small models: a number is one or two digits (never with the space before it: copying
# one is then always copying one token), a new line is one
# piece with its indentation and an edit's "+", and what stands between the numbers of a hunk's header is one piece.
PATTERN = "|".join([
    r"@@ -", r",0 \+", r" @@\n\+ *", r"\n\+? *", r"\p{N}{1,2}",
    r"'(?:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+", r"\s+?(?=\n|\S)", r"\s+"])


def get_tokenizer(name):
    """tiktoken.Encoding with the special tokens <|endoftext|> and <|diff|>, from the name of one of tiktoken's own
    encodings (fetched by tiktoken on first use) or a .tiktoken file: a line per token, base64 and rank. Or a published
    one as it is (TinyCodeLM's writes <|diff|> as text): a tokenizer.json, or the name of a Hugging Face model.
    OSError or ValueError if there is none such."""
    if "/" in name and not Path(name).exists() and not name.endswith((".tiktoken", ".json")):
        name = str(hub_model(name) / "tokenizer.json")
    if name.endswith(".json"):
        return HubEncoding(name)
    if name.endswith(".tiktoken"):
        lines = Path(name).read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks), DIFF: len(ranks) + 1})
    try:
        base = tiktoken.get_encoding(name)
    except OSError as e:
        raise OSError(f"tiktoken fetches it from the network at its first use, and could not ({type(e).__name__}); it keeps it "
                      "in the folder that TIKTOKEN_CACHE_DIR names: fill that on a machine with a network") from None
    except ValueError:
        raise ValueError("neither one of tiktoken's encodings (" + ", ".join(tiktoken.list_encoding_names()) + "), nor a "
                         ".tiktoken or .json file, nor a Hugging Face model (owner/name)") from None
    return tiktoken.Encoding(name + "+diff", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
                             special_tokens={EOT: base.eot_token, DIFF: base.n_vocab})


def fingerprint(enc):
    """16 hex digits that differ for tokenizers that differ: data, checkpoints and models must agree on it."""
    table = sorted((rank, token) for token, rank in enc._mergeable_ranks.items())
    return hashlib.sha256(repr((table, sorted(enc._special_tokens.items()), enc._pat_str)).encode()).hexdigest()[:16]


def train_tokenizer(path, texts, size):
    """Train a byte-level BPE of `size` entries on an iterable of texts and write it in tiktoken's form."""
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(texts, size, pattern=PATTERN)
    lines = (f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in bpe.get_mergeable_ranks())
    write_whole(Path(path), "".join(lines).encode())


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what "ByteLevel" splits by
_shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in _shown} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(_shown)))}
BYTES = {letter: b for b, letter in LETTERS.items()}  # GPT-2's way to write any byte as a printable character


# `tokenizers` knows the marks of Unicode 9: later ones stay where they stand. Here are those that Python knows (15.1).
LATER_MARKS = re.compile(
    "([\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27"
    "\U00010eab\U00010eac\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e\U00011839"
    "\U0001183a\U00011930\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45"
    "\U00011d97\U00011f41\U00011f42\U00016ff0\U00016ff1\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
    "\U0001e4ec-\U0001e4ef])")


class HubEncoding(tiktoken.Encoding):
    """A byte-level BPE in a tokenizer.json, as a tiktoken encoding that gives the ids that `tokenizers` gives.

    Added tokens (GPT-NeoX's runs of spaces) are found before the BPE, the longest first; special ones only where
    `allowed_special` has them. ValueError on a file that tiktoken's algorithm would not read in the same way."""

    def __init__(self, path):
        self.source = Path(path).read_text(encoding="utf-8")
        data = json.loads(self.source)
        model, added = data["model"], data["added_tokens"]
        splitters = data["pre_tokenizer"] or {}
        splitters = splitters.get("pretokenizers", [splitters])
        kinds = [p.get("type") for p in splitters]
        wrong = [f"{k}={model[k]!r}" for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
                 if model.get(k)]
        wrong += [f"model={model['type']!r}"] * (model["type"] != "BPE")
        wrong += [f"pre_tokenizer={kinds}"] * (kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or len(kinds) == 2 and
                                               (splitters[0]["behavior"] != "Isolated" or splitters[0].get("invert")))
        wrong += ["add_prefix_space"] * any(p.get("add_prefix_space") for p in splitters)
        wrong += [f"normalizer={data['normalizer']}"] * (data.get("normalizer") not in (None, {"type": "NFC"}))
        wrong += [f"{k} of {t['content']!r}" for t in added for k in ("lstrip", "rstrip", "single_word") if t.get(k)]
        if wrong:
            raise ValueError(f"{path}: not supported: {', '.join(wrong)}")
        specials = {t["content"]: t["id"] for t in added}
        encode = lambda token: bytes(BYTES[c] for c in token)
        ranks = {encode(token): i for token, i in model["vocab"].items() if token not in specials}
        merges = [tuple(map(encode, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
        if EOT not in specials or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError(f"{path}: not a byte-level BPE with {EOT}")
        check_merges(path, ranks, merges, model.get("ignore_merges"))
        self.nfc = bool(data.get("normalizer"))
        self.plain = {t["content"] for t in added if not t["special"]}
        self.raw = {t["content"] for t in added if not t["normalized"]}
        super().__init__(str(path), mergeable_ranks=ranks, special_tokens=specials,
                         pat_str=GPT2 if len(kinds) == 1 else splitters[0]["pattern"]["Regex"])

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        special = set(self._special_tokens) - self.plain
        allowed = special if allowed_special == "all" else special & set(allowed_special)
        for token in special - allowed if disallowed_special == "all" else disallowed_special:
            if token in text:
                raise ValueError(f"{token!r} stands in the text: give it in allowed_special, or disallowed_special=()")
        ids = []
        for i, piece in enumerate(split(text, self.raw & (allowed | self.plain))):
            if i % 2:
                ids.append(self._special_tokens[piece])
                continue
            if self.nfc:
                piece = "".join(unicodedata.normalize("NFC", part) for part in LATER_MARKS.split(piece))
            for j, part in enumerate(split(piece, (allowed | self.plain) - self.raw)):
                ids.extend([self._special_tokens[part]] if j % 2 else self._core_bpe.encode_ordinary(part))
        return ids

    def encode_ordinary(self, text):
        return self.encode(text, disallowed_special=())


def split(text, tokens):
    """Text between tokens, at even places, and the tokens, at odd ones; of several at a place the longest."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest)) + ")", text) if tokens else [text]


def check_merges(path, ranks, merges, whole):
    """ValueError unless tiktoken's rule (join the neighbours whose union is the earliest token) does what the merges
    do. It does if they come in the order of their tokens, and each token has either every merge that can make it or
    the one by which the tokens before it spell it, as where a BPE was trained. whole: a text that is a token is it."""
    ways, order = {}, [ranks.get(left + right, -1) for left, right in merges]
    for left, right in merges:
        ways.setdefault(left + right, set()).add((left, right))
    wrong = "their order" if order != sorted(order) or -1 in order else None
    for token, rank in ranks.items():
        if len(token) == 1 or wrong:
            continue
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if best >= rank:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        have, every = ways.get(token, set()), {(token[:i], token[i:]) for i in range(1, len(token))
                                               if token[:i] in ranks and token[i:] in ranks}
        if not (have == every and (whole or len(parts) == 2) or len(parts) == 2 and have == {tuple(parts)}):
            wrong = f"those of {token!r}"
    if wrong:
        raise ValueError(f"{path}: tiktoken's BPE is not that of the file's merges ({wrong})")


def tokenizer_json(enc):
    """The text of a tokenizer.json that gives `enc`'s ids, for Hugging Face's libraries."""
    if isinstance(enc, HubEncoding):
        return enc.source
    ranks, write = enc._mergeable_ranks, lambda token: "".join(LETTERS[b] for b in token)
    merges = [f"{write(t[:i])} {write(t[i:])}" for t in sorted(ranks, key=ranks.get) for i in range(1, len(t))
              if t[:i] in ranks and t[i:] in ranks]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=level,
        added_tokens=[dict(id=i, content=t, **flags) for t, i in sorted(enc._special_tokens.items(), key=lambda x: x[1])],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern={"Regex": enc._pat_str}, behavior="Isolated", invert=False), level]),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=True,
                   vocab={write(t): i for t, i in ranks.items()} | enc._special_tokens, merges=merges)), ensure_ascii=False)


class Marker(str):
    """What we put between texts ourselves: the token that the tokenizer has for it. The same characters in a text are
    text."""


def encode_parts(enc, parts):
    """Token ids of texts and Markers in a row; a Marker that the tokenizer has no token for is text, too."""
    ids, text = [], ""
    for part in parts:
        if isinstance(part, Marker) and part in enc._special_tokens:
            ids, text = ids + enc.encode_ordinary(text) + [enc._special_tokens[part]], ""
        else:
            text += part
    return ids + enc.encode_ordinary(text)


def encode_prompt(enc, form, prompt):
    """What a model of the form "edits", "programs" or "text" reads before it writes: token ids."""
    if form == "edits":
        return encode_parts(enc, (prompt + "\n", Marker(DIFF)))
    return enc.encode_ordinary(prompt + "\n" * (form == "programs" and not prompt[-1:].isspace()))


def encode_example(enc, form, prompt, answer):
    """(prompt, response) of a training example, token ids: lintseq.training_text where the answer is an edit path, else
    the program, behind a new line unless one side has white space already."""
    if form == "edits":
        parts = [part for edit in answer for part in (edit + "\n", Marker(DIFF))]
        return encode_prompt(enc, form, prompt), encode_parts(enc, (*parts, "\n", Marker(DIFF), Marker(EOT)))
    gap = "" if prompt[-1:].isspace() or answer[:1].isspace() else "\n"
    return enc.encode_ordinary(prompt + gap), encode_parts(enc, (answer, Marker(EOT)))


# -- The Hugging Face hub ---------------------------------------------------------------------------------------------

HUB = {  # our name: (dataset, its folder or file)
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT"),
    "the-stack": ("bigcode/the-stack", "data/python"),
    "magicoder": ("ise-uiuc/Magicoder-OSS-Instruct-75K", "data-oss_instruct-decontaminated.jsonl"),
    "starcoder2": ("bigcode/self-oss-instruct-sc2-exec-filter-50k", "data/train-00000-of-00001.parquet"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval"),
    "mbpp": ("google-research-datasets/mbpp", "full"),
}
TRIES, PAUSE = 8, 1.0  # failures in a row that end a download; seconds after the first, doubled each time


def get(url, page, start=0, stream=False):
    """A response with status 200, 206 or 416 from byte `start` on. FileNotFoundError, which says what to do, if the
    server refuses; requests' exceptions for what may pass."""
    import requests
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    if os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"  # requests drops it when redirected elsewhere
    answer = requests.get(url, headers=headers, stream=stream, timeout=30)
    if answer.status_code in (401, 403):
        raise FileNotFoundError(f"{url}: status {answer.status_code}: accept the terms on {page} and set HF_TOKEN to a "
                                "token of that account (" + page.split("/")[0] + "//" + page.split("/")[2] + "/settings/tokens)")
    if answer.status_code in (404, 410):
        raise FileNotFoundError(f"{url}: status {answer.status_code}: no such file; see {page}")
    if answer.status_code not in (200, 206, 416):
        pause = answer.headers.get("Retry-After", "")
        time.sleep(min(int(pause), 300) if pause.isdigit() else 0)
        raise requests.HTTPError(f"status {answer.status_code}")
    return answer


def patiently(url, work, tries=TRIES):
    """work(), again and again while the network or the server fails, unless `tries` times without work.done growing."""
    import requests
    failures, best = 0, -1
    while True:
        try:
            return work()
        except (requests.RequestException, ValueError) as e:  # ValueError: half a JSON, or a wrong checksum
            done = getattr(work, "done", 0)
            failures, best = (0 if done > best else failures) + 1, max(best, done)
            if failures == tries:
                raise ConnectionError(f"{url}: {e} ({tries} times); the same command goes on from here") from None
            time.sleep(min(60, PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1))


def checksum(path, digest):
    """Whether a file has a SHA-256 (64 digits) or git's SHA-1 of a blob (40): what the hub knows of a file."""
    h = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest() == digest


def fetch(url, page, path, size, digest, bar):
    """Download to `path` through `path`.part, from where an earlier run stopped; size and checksum are verified."""
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # other processes wait, and find it there

        def work():
            if f.tell() != size:
                with get(url, page, f.tell(), stream=True) as answer:
                    if answer.status_code != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {f.tell()}-"):
                        f.seek(f.truncate(0))  # this server cannot go on in the middle
                    for block in answer.iter_content(1 << 16):
                        f.write(block)
                        bar.update(len(block))
                        work.done = max(work.done, f.tell())
            f.flush()
            os.fsync(f.fileno())
            if f.tell() < size:
                raise ValueError("it ended early")
            if not checksum(part, digest):
                f.seek(f.truncate(0))
                raise ValueError("its checksum is wrong")
            os.replace(part, path)

        work.done = f.tell()
        if path.is_file():
            part.unlink()
        else:
            patiently(url, work)


def hub_files(repo, folder="", kind="datasets", want=lambda paths: paths, share=False):
    """Local paths, sorted, of the files of a repository's folder (or of one file) that `want` picks from their names;
    what is not there yet is downloaded, several at once. The listing is kept, so that a complete copy needs no network.
    share: each rank downloads its part and waits for the others. HF_ENDPOINT and HF_TOKEN as in Hugging Face's tools.
    FileNotFoundError if the hub refuses, ConnectionError if it cannot be reached."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    place = f"{endpoint}/{'datasets/' * (kind == 'datasets')}{repo}"
    single, root = folder if "." in Path(folder).name else None, DATA / "hub" / kind / repo
    folder = str(Path(folder).parent) if single else folder
    listing, rows = root / folder / ".files.json", []
    if not listing.is_file():
        url = f"{endpoint}/api/{kind}/{repo}/tree/main/{'' if folder == '.' else folder}".rstrip("/")
        while url:
            answer = patiently(url, lambda: (lambda r: (r.json(), r.links))(get(url, place)), tries=4)
            rows += [[f["path"], f["size"], f.get("lfs", f)["oid"]] for f in answer[0] if f["type"] == "file"]
            url = answer[1].get("next", {}).get("url")
        write_whole(listing, json.dumps(rows).encode())
    rows = sorted(json.loads(listing.read_text()))
    wanted = [single] if single else want([path for path, _, _ in rows])
    rows = [row for row in rows if row[0] in set(wanted)]
    if not rows:
        raise FileNotFoundError(f"{place} has no {single or 'such files'} (if it is newer than {listing}, delete that)")
    missing = [row for row in rows if not (root / row[0]).is_file()]
    have = sum(p.stat().st_size for row in missing if (p := root / (row[0] + ".part")).is_file())
    if missing:
        room(f"{repo}: {len(missing)} of {len(rows)} files to download", sum(size for _, size, _ in missing) - have)
    mine = [row for i, row in enumerate(rows) if row in missing and (i % WORLD == RANK or not share)]
    with tqdm(total=sum(row[1] for row in mine), unit="B", unit_scale=True, desc=repo, disable=not mine, mininterval=1) as bar, \
            ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fetch, f"{place}/resolve/main/{path}", place, root / path, size, digest, bar)
                for path, size, digest in mine]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    wait_for([root / path for path, _, _ in rows], "files that other ranks download")
    return [root / path for path, _, _ in rows]


def hub_model(name):
    """The local folder of a model of the hub: config, tokenizer and weights, as safetensors where it has them."""
    def want(paths):
        weights = [p for p in paths if p.endswith((".safetensors", ".safetensors.index.json"))] or [
            p for p in paths if re.fullmatch(r"pytorch_model.*\.(bin|bin\.index\.json)", p)]
        return weights + [p for p in paths if p.endswith("onfig.json") or p == "tokenizer.json"]
    return hub_files(name, kind="models", want=want)[0].parent


def wait_for(paths, what):
    missing = [p for p in paths if not p.exists()]
    while missing and WORLD > 1:
        print(f"  waiting for {len(missing)} {what}", flush=True)
        for _ in range(30):
            time.sleep(2 if missing else 0)
            missing = [p for p in missing if not p.exists()]


def room(what, wanted):
    """Say how many bytes are about to be written; one line and out if the disk has not so many."""
    folder = next(p for p in (DATA.absolute(), *DATA.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if RANK == 0:
        print(f"  {what}: about {wanted / 1e9:,.2f} GB, {free / 1e9:,.2f} GB free", flush=True)
    if wanted > free:
        die(f"{what}: needs about {wanted / 1e9:,.2f} GB, and {folder} has {free / 1e9:,.2f} GB free: make room, or link "
            f"{DATA} to a larger disk")


# -- Corpora ----------------------------------------------------------------------------------------------------------

SHARD = 16 << 20  # bytes of text that one worker tokenizes at a time, and that a killed run does again
LONGEST = 64 << 20  # bytes of a row; longer ones are skipped, so that a worker's memory is bounded
KINDS = (".py", ".txt", ".jsonl", ".jsonl.gz", ".parquet")


def corpus_files(corpus):
    """The files of "stdlib" (this Python's own library, without its tests), a dataset of HUB, a file or a folder."""
    if corpus == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3"}
        return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    name, _, count = corpus.partition(":")
    if name in HUB and (count.isdigit() or not count):
        pick = lambda paths: [p for p in paths if p.endswith(KINDS)][:int(count) if count else None]
        return hub_files(*HUB[name], want=pick, share=True)
    root = Path(corpus)
    if not root.exists():
        die(f"corpora: no file or folder {corpus}, nor one of {', '.join(['stdlib', 'fineweb', 'the-stack'])}")
    return sorted(p for p in root.rglob("*") if p.name.endswith(KINDS) and p.is_file()) if root.is_dir() else [root]


@functools.lru_cache(1)  # its footer is read once, not for each row group
def parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        die(f"{path} is Parquet: pip install pyarrow")
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)


def text_column(file):
    """(name, number among the leaves of the schema) of the column `text` or `content`."""
    leaves = [file.metadata.schema.column(c).path for c in range(file.metadata.num_columns)]
    for name in ("text", "content"):
        if name in leaves:
            return name, leaves.index(name)
    raise ValueError(f"no column text or content, but {', '.join(file.schema_arrow.names)}")


def spans(path):
    """[(path, begin, end, bytes)]: pieces of a file that can be read on their own; row groups of Parquet, parts of a
    JSONL (a row belongs to the part it begins in), else the whole file. bytes: of text, about."""
    name, size = str(path), os.path.getsize(path)
    if name.endswith(".parquet"):
        try:
            meta, at = parquet(name).metadata, text_column(parquet(name))[1]
            return [(name, i, i + 1, meta.row_group(i).column(at).total_uncompressed_size) for i in range(meta.num_row_groups)]
        except (OSError, ValueError):
            return [(name, 0, 1, 0)]  # read_span says what is wrong
    if name.endswith(".jsonl"):
        return [(name, at, min(at + SHARD, size), min(SHARD, size - at)) for at in range(0, size, SHARD)]
    return [(name, 0, size, size * (4 if name.endswith(".gz") else 1))]


def read_span(name, begin, end):
    """Yield (name of a document, text) of a span; (name, ValueError) for what cannot be read."""
    try:
        if name.endswith(".parquet"):
            import pyarrow
            file, meta = parquet(name), parquet(name).metadata
            row = sum(meta.row_group(g).num_rows for g in range(begin))
            rows = 1 if meta.row_group(begin).total_byte_size > 4 * LONGEST else 16  # held at a time
            for batch in file.iter_batches(rows, row_groups=range(begin, end), columns=[text_column(file)[0]], use_threads=False):
                values = batch.column(0)
                large = values.type in (pyarrow.large_string(), pyarrow.large_binary())
                for value in values.cast(pyarrow.large_binary() if large else pyarrow.binary()):
                    row += 1
                    yield f"{name}:{row}", too_long(value.as_buffer() and value.as_buffer().size) or decode(value.as_py())
        elif name.endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as f:
                if begin:  # the row that this part begins in is the one before's, unless it begins right here
                    f.seek(begin - 1)
                    while (line := f.readline(LONGEST)) and not line.endswith(b"\n"):
                        pass
                while f.tell() < end or name.endswith(".gz"):
                    at, line = f.tell(), f.readline(LONGEST)
                    if not line:
                        break
                    if len(line) == LONGEST and not line.endswith(b"\n"):
                        yield f"{name}, byte {at}", too_long(LONGEST + 1)
                        while (line := f.readline(LONGEST)) and not line.endswith(b"\n"):
                            pass
                    elif line.strip():
                        yield f"{name}, byte {at}", row_text(line)
        else:  # a long text becomes several documents
            with open(name, encoding="utf-8") as f:
                text = f.read(SHARD // 2)
                while True:
                    more = f.readline(SHARD // 2) if len(text) == SHARD // 2 else ""
                    yield name, text + more
                    if not (text := f.read(SHARD // 2) if more else ""):
                        break
    except UnicodeDecodeError:
        yield name, ValueError("not UTF-8")
    except (OSError, EOFError, ValueError, MemoryError, zlib.error) as e:  # pyarrow's errors are among them
        yield name, ValueError(f"unreadable {Path(name).suffix[1:]}: {str(e).splitlines()[0][:200]}")


def too_long(size):
    return ValueError(f"longer than {LONGEST >> 20} MB") if size and size > LONGEST else None


def decode(data):
    try:
        return ValueError("no text") if data is None else data.decode()
    except UnicodeDecodeError:
        return ValueError("not UTF-8")


def row_text(line):
    """The text of a JSONL's row, from `text` or `content`."""
    try:
        row = json.loads(line)
        text = row["text"] if "text" in row else row["content"]
        text.encode()
        return text
    except UnicodeError:
        return ValueError("not UTF-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ValueError("broken row")


def documents(corpus):
    """Yield (name, text) of a corpus, without what cannot be read."""
    for path in corpus_files(corpus):
        for name, begin, end, _ in spans(path):
            yield from ((n, text) for n, text in read_span(name, begin, end) if isinstance(text, str))


def held_out(text, fraction):
    """Whether a text belongs to the validation set, by its hash alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2 ** 64


def pieces(text):
    """Cut a long text where every tokenizer's pattern cuts it too: between a letter and a new line or space. Only what
    has no such place, or a run of white space that would overflow the stack of tiktoken's regex, is cut anywhere."""
    at, size, block = 0, 1 << 18, 4096
    walls = [i for i in range(0, len(text), block) if text[i].isspace() and text[i:i + block].isspace()]
    while at < len(text):
        end = min(at + size, len(text), next((w for w in walls if w > at), len(text)))
        if end == at + size:
            for gap in "\n ":
                cut = text.rfind(gap, at + size // 2, end)
                while cut > 0 and not (text[cut - 1].isascii() and text[cut - 1].isalpha()):
                    cut = text.rfind(gap, at + size // 2, cut)
                if cut > 0:
                    end = cut
                    break
        yield text[at:end]
        at = end


def tokenize(work):
    """Tokenize one shard, a list of spans, into `stem`.train and `stem`.val; `stem`.json, written last, says it is
    done. Returns the shard's bytes of text."""
    stem, shard, fraction = work
    tmp = {split: Path(f"{stem}.{split}.{os.getpid()}.tmp") for split in ("train", "val")}
    files, counts = {split: open(p, "wb") for split, p in tmp.items()}, {"train": [0, 0], "val": [0, 0]}
    skipped = []
    for name, begin, end, _ in shard:
        for document, text in read_span(name, begin, end):
            if not text or not isinstance(text, str):
                skipped.append((document, str(text or "empty")))
                continue
            split = "val" if held_out(text, fraction) else "train"
            for piece in pieces(text):
                tokens = _enc.encode_ordinary(piece)
                files[split].write(np.array(tokens, dtype="<u2").tobytes())
                counts[split][0] += len(tokens)
            files[split].write(_enc.eot_token.to_bytes(2, "little"))
            counts[split][0] += 1
            counts[split][1] += 1
    for split, f in files.items():
        f.flush()
        os.fsync(f.fileno())
        f.close()
        os.replace(tmp[split], f"{stem}.{split}")
    write_whole(Path(f"{stem}.json"), json.dumps({"counts": counts, "skipped": skipped}).encode())
    return sum(span[3] for span in shard)


def start_worker(tokenizer, parent):
    """What each process does first: its tokenizer and its bound of memory; and it ends when its parent is killed."""
    global _enc
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _enc = get_tokenizer(tokenizer)
    limit_memory()


def limit_memory():
    """1.5 GB more than now, which a page of Parquet can exceed: what does not fit is skipped and listed."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stacks
        resource.setrlimit(resource.RLIMIT_DATA, (used + (1536 << 20), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def write_bins(folder, enc, cfg):
    """Tokenize cfg.corpora into folder/{train,val}.bin, each document followed by end-of-text. The work is cut into
    shards of SHARD bytes, in folder/shards until all are done: shard i is rank i % WORLD_SIZE's, and the bins are the
    shards in their order, whoever made them, and however often the run was killed. Returns meta, None on other ranks."""
    limit_memory()
    shards, sizes, estimate = [[]], [0], 0
    for corpus in cfg.corpora:
        files = [span for path in corpus_files(corpus) for span in spans(path)]
        if not files:
            die(f"corpora: no {' '.join(KINDS)} in {corpus}")
        for span in files:
            if sizes[-1] and sizes[-1] + span[3] > SHARD:
                shards.append([])
                sizes.append(0)
            shards[-1].append(span)
            sizes[-1] += span[3]
        texts = (t for span in files[:20] for _, t in read_span(*span[:3]) if isinstance(t, str))
        sample = next(texts, "")[:1 << 16] + "".join(next(texts, "")[:1 << 14] for _ in range(20))
        rate = len(enc.encode_ordinary(sample)) / max(1, len(sample.encode()))  # tokens a byte
        size = sum(span[3] for span in files)
        estimate += size * rate
        if RANK == 0:
            print(f"  {corpus}: {size / 1e9:,.2f} GB of text, about {size * rate / 1e6:,.1f} million tokens")
    place = folder / "shards"
    stems = [place / f"{i:06}" for i in range(len(shards))]
    done = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    room(f"tokens in {len(shards)} shards", max(0, 2 * estimate - done))
    plan = json.dumps([fingerprint(enc), cfg.val_fraction, shards]).encode()
    if (place / "plan.json").is_file() and (place / "plan.json").read_bytes() != plan:
        die(f"{place} was begun with other corpora, tokenizer or val_fraction: set them back, or delete it")
    write_whole(place / "plan.json", plan)

    todo = [(str(stem), shard, cfg.val_fraction) for i, (stem, shard) in enumerate(zip(stems, shards))
            if i % WORLD == RANK and not Path(f"{stem}.json").is_file()]
    start = time.time()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(max(1, min(len(todo), cfg.workers or cpus)), multiprocessing.get_context("spawn"),
                               start_worker, (cfg.tokenizer, os.getpid()))
    with pool, tqdm(total=sum(sizes[RANK::WORLD]), unit="B", unit_scale=True, desc="tokenizing", mininterval=1) as bar:
        bar.update(bar.total - sum(span[3] for work in todo for span in work[1]))
        try:
            for job in as_completed([pool.submit(tokenize, work) for work in todo]):
                bar.update(job.result())
        except BrokenProcessPool:
            die("a worker was killed (out of memory?): the same command goes on; --workers=… asks for fewer")
        finally:
            pool.shutdown(cancel_futures=True)
    if RANK > 0:
        return None
    wait_for([Path(f"{stem}.json") for stem in stems], "shards of other ranks")
    meta = join(folder, stems, {"form": "text", **tokenizer_meta(cfg.tokenizer, enc), "sources": list(cfg.corpora)})
    print(f"  tokenized in {time.time() - start:.1f} s")
    return meta


def join(folder, stems, meta):
    """Lay the shards' tokens end to end. A shard is deleted once its bytes are safe in the bin, so the disk holds the
    tokens once; where it goes is known from the counts before it, so that this too can be killed."""
    shards = [json.loads(Path(f"{stem}.json").read_text()) for stem in stems]
    for split in ("train", "val"):
        at, tmp = 0, folder / f"{split}.bin.tmp"
        if tmp.is_file() or any(Path(f"{stem}.{split}").is_file() for stem in stems):
            with open(tmp, "r+b" if tmp.is_file() else "w+b") as f:
                for stem, shard in zip(stems, shards):
                    path = Path(f"{stem}.{split}")
                    if path.is_file():
                        f.seek(at)
                        with open(path, "rb") as part:
                            shutil.copyfileobj(part, f, 1 << 24)
                        f.flush()
                        os.fsync(f.fileno())
                        path.unlink()
                    at += 2 * shard["counts"][split][0]
                f.truncate(at)
            os.replace(tmp, folder / f"{split}.bin")
    skipped = [entry for shard in shards for entry in shard["skipped"]]
    if skipped:
        write_whole(folder / "skipped.jsonl", "".join(json.dumps(entry) + "\n" for entry in skipped).encode())
    meta["skipped"] = Counter(reason for _, reason in skipped)
    for split in ("train", "val"):
        tokens, texts = map(sum, zip(*(shard["counts"][split] for shard in shards)))
        meta[split] = {"tokens": tokens, "documents": texts}
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())
    shutil.rmtree(folder / "shards")
    return meta


def tokenizer_meta(name, enc):
    return {"tokenizer": name, "fingerprint": fingerprint(enc), "vocab_size": enc.n_vocab}


# -- Instruction data -------------------------------------------------------------------------------------------------

def stdlib_pairs():
    """Yield {instruction, response} from the standard library: each module-level function that has a docstring and
    needs nothing but builtins and imports, as «docstring to function», without its docstring, with the imports."""
    seen = set()
    for _, text in documents("stdlib"):
        try:
            tree, lines = ast.parse(text or ""), (text or "").splitlines()
        except (SyntaxError, ValueError):
            continue
        imports = {}  # {name: the line that binds it}
        for node in (n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and not getattr(n, "level", 0)):
            for alias in node.names:
                one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
                imports[alias.asname or alias.name.split(".")[0]] = ast.unparse(one) + "\n"
        for node in tree.body:
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not doc or not doc.isascii() or "<|" in doc or node.decorator_list or len(node.body) < 2:
                continue
            summary, first = " ".join(doc.split("\n\n")[0].split()), node.body[0]
            code = "\n".join(lines[node.lineno - 1:first.lineno - 1] + lines[first.end_lineno:node.end_lineno])
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(imports)
            code = "".join(imports[name] for name in sorted(used)) + ("\n" if used else "") + code
            body = ast.dump(ast.Module(node.body[1:], []))
            try:
                clean = body not in seen and len(summary) >= 20 and "Global(" not in body and not lintseq.lint(code)
            except SyntaxError:
                continue
            if clean:
                seen.add(body)
                yield {"instruction": f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {summary}",
                       "response": code}


# The procedural family: filter x map x reduce x finish over a list of integers, each an English phrase and some lines
# of Python. It cannot be solved by copying: the instruction holds no code, and a composition (which filter, map,
# reduction and finish, whatever their constants) that is held out never stands in the training data, so that its
# program is nowhere to be found; only the constants and names are copied, and to the places where they belong.
# {k} is a constant, {a} the argument, {x} an item.
HELPERS = {
    "is_prime": "def is_prime(n):\n    return n > 1 and all(n % d for d in range(2, n))\n",
    "digit_sum": "def digit_sum(n):\n    return sum(int(d) for d in str(abs(n)))\n",
    "collatz": "def collatz(n):\n    if n % 2 == 0:\n        return n // 2\n    return 3 * n + 1\n",
}
FILTERS = {
    "even": (("takes the even numbers in {a}", "keeps what is even in {a}"), "{x} % 2 == 0"),
    "odd": (("takes the odd numbers in {a}", "keeps what is odd in {a}"), "{x} % 2 == 1"),
    "positive": (("takes the positive numbers in {a}", "keeps what is above zero in {a}"), "{x} > 0"),
    "negative": (("takes the negative numbers in {a}", "keeps what is below zero in {a}"), "{x} < 0"),
    "above": (("takes the numbers in {a} that are greater than {k}", "keeps what is above {k} in {a}"), "{x} > {k}"),
    "below": (("takes the numbers in {a} that are less than {k}", "keeps what is below {k} in {a}"), "{x} < {k}"),
    "multiple": (("takes the multiples of {k} in {a}", "keeps what is divisible by {k} in {a}"), "{x} % {k} == 0"),
    "not_multiple": (("leaves out the multiples of {k} in {a}", "keeps what is not divisible by {k} in {a}"),
                     "{x} % {k} != 0"),
    "not_equal": (("leaves out every {k} in {a}", "keeps what is not {k} in {a}"), "{x} != {k}"),
    "near": (("takes the numbers in {a} that are less than {k} away from zero", "keeps what is within {k} of zero "
             "in {a}, {k} not included"), "abs({x}) < {k}"),
    "prime": (("takes the prime numbers in {a}", "keeps what is prime in {a}"), "is_prime({x})"),
    "digits": (("takes the numbers in {a} whose digits add up to more than {k}", "keeps what has a digit sum above {k} "
               "in {a}"), "digit_sum({x}) > {k}"),
    "last_digit": (("takes the numbers in {a} that end in an even digit other than zero", "keeps what is even but not "
                   "divisible by 10 in {a}"), "{x} % 2 == 0 and {x} % 10 != 0"),
    "all": (("takes all the numbers in {a}", "goes through {a}"), None),
}
MAPS = {
    "double": (("doubles each", "takes each twice"), "{x} * 2"),
    "times": (("multiplies each by {k}", "takes each {k} times"), "{x} * {k}"),
    "plus": (("adds {k} to each", "increases each by {k}"), "{x} + {k}"),
    "minus": (("subtracts {k} from each", "decreases each by {k}"), "{x} - {k}"),
    "from": (("subtracts each from {k}", "takes {k} minus each"), "{k} - {x}"),
    "square": (("squares each", "multiplies each by itself"), "{x} * {x}"),
    "negate": (("negates each", "flips the sign of each"), "-{x}"),
    "absolute": (("takes the absolute value of each", "drops the sign of each"), "abs({x})"),
    "half": (("divides each by {k}, rounding down", "takes the whole part of each over {k}"), "{x} // {k}"),
    "modulo": (("takes each modulo {k}", "takes the remainder of each by {k}"), "{x} % {k}"),
    "cap": (("limits each to at most {k}", "cuts each down to {k}"), "min({x}, {k})"),
    "floor": (("raises each to at least {k}", "lifts each up to {k}"), "max({x}, {k})"),
    "digit_sum": (("replaces each by the sum of its digits", "adds up the digits of each"), "digit_sum({x})"),
    "collatz": (("halves each that is even and makes the others three times as large plus one", "takes the Collatz "
                "step of each"), "collatz({x})"),
    "distance": (("takes the distance of each from {k}", "measures how far each is from {k}"), "abs({x} - {k})"),
}
REDUCES = {  # phrases, lines before the loop, lines for each value {y}, result, its type
    "sum": (("returns the sum", "adds them up"), ["total = 0"], ["total += {y}"], "total", "int"),
    "product": (("returns the product", "multiplies them together"), ["product = 1"], ["product *= {y}"], "product", "int"),
    "count_above": (("counts the results above {k}", "returns how many results exceed {k}"), ["count = 0"],
                    ["if {y} > {k}:", "    count += 1"], "count", "int"),
    "largest": (("returns the largest, or 0 if there is none above it", "finds the maximum, starting from 0"),
                ["best = 0"], ["if {y} > best:", "    best = {y}"], "best", "int"),
    "smallest": (("returns the smallest, or 0 if there is none below it", "finds the minimum, starting from 0"),
                 ["best = 0"], ["if {y} < best:", "    best = {y}"], "best", "int"),
    "alternate": (("returns the alternating sum, first plus then minus", "adds and subtracts them in turn"),
                  ["total = 0", "sign = 1"], ["total += sign * {y}", "sign = -sign"], "total", "int"),
    "weighted": (("returns the sum of each times its place, counting from 1", "adds them up, the first once, the second "
                 "twice and so on"), ["total = 0", "place = 1"], ["total += place * {y}", "place += 1"], "total", "int"),
    "horner": (("returns the result of adding each to {k} times what was there before", "folds them with factor {k}"),
               ["value = 0"], ["value = value * {k} + {y}"], "value", "int"),
    "last": (("returns the last one, or {k} if there is none", "gives the final one, or else {k}"), ["last = {k}"],
             ["last = {y}"], "last", "int"),
    "list": (("returns them as a list", "lists them"), ["result = []"], ["result.append({y})"], "result", "list"),
    "distinct": (("returns a list without repeats", "lists them, each only once"), ["result = []"],
                 ["if {y} not in result:", "    result.append({y})"], "result", "list"),
    "running": (("returns the running totals", "lists the sums so far"), ["total = 0", "result = []"],
                ["total += {y}", "result.append(total)"], "result", "list"),
    "steps": (("returns the differences from one to the next, starting from 0", "lists the change from each to the "
              "next, from 0 on"), ["before = 0", "result = []"], ["result.append({y} - before)", "before = {y}"],
              "result", "list"),
    "records": (("returns those greater than all before them and 0", "lists the new records above 0"),
                ["best = 0", "result = []"], ["if {y} > best:", "    best = {y}", "    result.append({y})"], "result", "list"),
    "reverse": (("returns them in reverse order", "lists them backwards"), ["result = []"], ["result.insert(0, {y})"],
                "result", "list"),
}
FINISHES = {  # phrases, lines after the loop ({r} is the result's name), the returned expression, type of result
    "plain": (("",), [], "{r}", "any"),
    "plus": ((", plus {k}", ", increased by {k}"), [], "{r} + {k}", "int"),
    "times": ((", times {k}", ", multiplied by {k}"), [], "{r} * {k}", "int"),
    "modulo": ((", modulo {k}", ", reduced modulo {k}"), [], "{r} % {k}", "int"),
    "absolute": ((", without its sign", ", as an absolute value"), [], "abs({r})", "int"),
    "cap": ((", but at most {k}", ", limited to {k}"), ["if {r} > {k}:", "    {r} = {k}"], "{r}", "int"),
    "negate": ((", negated", ", with its sign flipped"), [], "-{r}", "int"),
    "text": ((", as a string", ", turned into text"), [], "str({r})", "int"),
    "first": ((", only the first {k}", ", cut to length {k}"), [], "{r}[:{k}]", "list"),
    "sorted": ((", sorted", ", in increasing order"), ["{r}.sort()"], "{r}", "list"),
    "append": ((", with {k} at the end", ", followed by {k}"), ["{r}.append({k})"], "{r}", "list"),
    "length": ((", and of that only the length", ", and of that how many there are"), [], "len({r})", "list"),
    "skip": ((", without the first", ", all but the first"), [], "{r}[1:]", "list"),
    "default": ((", or [{k}] if nothing is left", ", or else [{k}]"), ["if not {r}:", "    {r} = [{k}]"], "{r}", "list"),
    "joined": ((", joined by spaces", ", as text with spaces between"), [], '" ".join(str(x) for x in {r})', "list"),
}
NAMES = "solve compute process combine answer convert collect handle".split()
ARGUMENTS = "nums values items data numbers".split()


def family_compositions():
    """Every (filter, map, reduce, finish) whose types fit: well over 10,000, in a fixed order."""
    return [(f, m, r, e) for f in FILTERS for m in MAPS for r in REDUCES for e in FINISHES
            if FINISHES[e][3] in ("any", REDUCES[r][4])]


def family_program(composition, name, a, constants):
    """The program of one composition; `constants`: of the filter, the map, the reduction and the finish."""
    (f, m, r, e), (kf, km, kr, ke) = composition, constants
    fill = lambda text, k: text.format(x="x", y="y", a=a, k=k, r=REDUCES[r][3])
    inner = [f"y = {fill(MAPS[m][1], km)}"] + [fill(line, kr) for line in REDUCES[r][2]]
    if FILTERS[f][1]:
        inner = [f"if {fill(FILTERS[f][1], kf)}:"] + ["    " + line for line in inner]
    body = [fill(line, kr) for line in REDUCES[r][1]] + [f"for x in {a}:"] + ["    " + line for line in inner]
    body += [fill(line, ke) for line in FINISHES[e][1]] + [f"return {fill(FINISHES[e][2], ke)}"]
    program = "\n    ".join([f"def {name}({a}):"] + body)
    return "".join(code + "\n" for helper, code in HELPERS.items() if helper + "(" in program) + program


def family_problem(composition, rng):
    """{instruction, response, entry_point, test} of one composition: names, constants and phrases drawn by `rng`, the
    assertions computed by running the program."""
    name, a, finish = rng.choice(NAMES), rng.choice(ARGUMENTS), composition[3]
    constants = [rng.randint(2, 20) for _ in range(3)] + [rng.randint(2, 4 if finish == "first" else 20)]
    phrases = [rng.choice(table[key][0]).format(a=a, k=k) for table, key, k in
               zip((FILTERS, MAPS, REDUCES, FINISHES), composition, constants)]
    program, space = family_program(composition, name, a, constants), {}
    exec(program, space)  # ours, not a model's
    tests = [[]] + [[rng.randint(-12, 30) for _ in range(rng.randint(3, 9))] for _ in range(9)]
    return {"instruction": f"Write a Python function `{name}({a})` that {phrases[0]}, {phrases[1]} and {phrases[2]}"
                           f"{phrases[3]}.",
            "response": program, "entry_point": name,
            "test": "".join(f"assert {name}({t}) == {space[name](list(t))!r}\n" for t in tests)}


def family(cfg):
    """(training pairs, held-out problems). What is held out shares no composition with training, and no program that
    is the same but for its constants (doubling and multiplying by k are such) either. Training takes its compositions
    in turn until there are cfg.family_size pairs."""
    rng, groups = random.Random(cfg.seed), {}
    for c in family_compositions():
        groups.setdefault(re.sub(r"\d+", "", family_program(c, "f", "a", [0] * 4)), []).append(c)
    groups = list(groups.values())
    rng.shuffle(groups)
    test = [rng.choice(group) for group in groups[:cfg.family_heldout]]
    train = [c for group in groups[cfg.family_heldout:] for c in group]
    rng.shuffle(train)
    pairs = [family_problem(train[i % len(train)], rng) for i in range(cfg.family_size)]
    problems = [{"task_id": f"family/{i}", "composition": c, **family_problem(c, rng)} for i, c in enumerate(test)]
    return ([{k: p[k] for k in ("instruction", "response")} for p in pairs],
            [{**p, "canonical_solution": p.pop("response")} for p in problems])


def read_pairs(path):
    """Yield the rows of a JSONL of instruction and response, as bytes; `die` names the first one that is broken."""
    for n, line in enumerate(Path(path).open("rb"), 1):
        try:
            row = json.loads(line)
            yield {"instruction": row["instruction"], "response": row["response"]}
        except (ValueError, KeyError, TypeError) as e:
            die(f"{path}, row {n}: {type(e).__name__}: {e}; a row is a JSON object with `instruction` and `response`")


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)


def code_of(text):
    """The Python of an answer in Markdown: the contents of its python fences (of the bare ones, if there are none),
    joined; a text without fences if it is Python; else ""."""
    blocks = [(language.lower(), textwrap.dedent(code).strip("\n")) for language, code in FENCE.findall(text)]
    codes = [c for language, c in blocks if language in ("python", "python3", "py")] or [c for language, c in blocks if not language]
    if not blocks:
        try:
            ast.parse(text)
            codes = [text.strip("\n")]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    code = "\n".join(codes)
    return code + "\n" if code.strip() else ""


def table(path):
    """Yield the rows of a .jsonl or .parquet as dicts; None for a broken one."""
    if str(path).endswith(".parquet"):
        for batch in parquet(path).iter_batches():
            yield from batch.to_pylist()
    else:
        for line in open(path, "rb"):
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def hub_pairs(name, left_out):
    """Yield {instruction, response} of Magicoder's or StarCoder2's data: Python only, without its Markdown."""
    for path in hub_files(*HUB[name]):
        for row in table(path):
            try:
                if row.get("lang", "python") != "python":
                    left_out["of another language"] += 1
                    continue
                instruction, response = row.get("instruction") or row["problem"], code_of(row.get("response") or row["solution"])
                (instruction + response).encode()
            except (KeyError, TypeError, AttributeError, ValueError):
                left_out["broken rows"] += 1
                continue
            if response and instruction.strip():
                yield {"instruction": instruction.strip(), "response": response}
            else:
                left_out["without code"] += 1


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def grams(sequence, n):
    return {" ".join(sequence[i:i + n]) for i in range(len(sequence) - n + 1)}


def contamination():
    """A test for a pair: does it hold ten words in a row of a HumanEval or MBPP problem's text (all of them, where it has
    six to nine), or all the words of its solution? A word is a run of letters, in lower case."""
    texts, solutions = {n: set() for n in range(6, 11)}, {}
    for name, text, solution in (("humaneval", "prompt", "canonical_solution"), ("mbpp", "text", "code")):
        for path in hub_files(*HUB[name], want=lambda paths: [p for p in paths if p.endswith(".parquet")]):
            for row in table(path):
                n = min(10, len(words(row[text])))
                texts.setdefault(n, set()).update(grams(words(row[text]), n))
                code = words(row[solution])
                if len(code) >= 10:
                    solutions.setdefault(" ".join(code[:10]), []).append(" ".join(code))

    def contaminated(pair):
        sequence = words(pair["instruction"] + "\n" + pair["response"])
        mine = {n: grams(sequence, n) for n in range(6, 11)}
        return any(mine[n] & texts[n] for n in mine) or any(
            f" {whole} " in f" {' '.join(sequence)} " for start in mine[10] & solutions.keys() for whole in solutions[start])
    return contaminated


class NearDuplicates:
    """MinHash over runs of five words and signs, 64 hashes in 16 bands of 4, then the true Jaccard index: a text is a
    near duplicate of one before it if they share 70% of their runs (The Stack's measure)."""

    def __init__(self, threshold=0.7):
        self.threshold, self.kept, self.bands = threshold, [], {}
        self.a, self.b = np.random.default_rng(0).integers(1, 2 ** 63, (2, 64, 1), dtype=np.uint64) | np.uint64(1)

    def seen(self, text):
        parts = re.findall(r"\w+|[^\w\s]", text.lower())
        runs = {zlib.crc32(" ".join(parts[i:i + 5]).encode()) for i in range(max(1, len(parts) - 4))}
        runs = np.fromiter(runs, dtype=np.uint64)
        signature = ((self.a * runs + self.b) >> np.uint64(32)).min(1).reshape(16, 4)
        keys = [(i, band.tobytes()) for i, band in enumerate(signature)]
        for n in {n for key in keys for n in self.bands.get(key, ())}:
            shared = len(np.intersect1d(runs, self.kept[n], assume_unique=True))
            if shared >= self.threshold * (len(runs) + len(self.kept[n]) - shared):
                return True
        for key in keys:
            self.bands.setdefault(key, []).append(len(self.kept))
        self.kept.append(runs)
        return False


def make_instruct(cfg):
    """Write cfg.source (pairs) and, with the family, cfg.benchmark (its held-out problems). Repeated responses go; of
    the hub's data near duplicates and what the benchmarks hold go too."""
    pairs, seen, near, contaminated = [], set(), NearDuplicates(), None
    for name in cfg.instruct:
        left_out, before = Counter(), len(pairs)
        if name == "family":
            rows, problems = family(cfg)
            write_whole(Path(cfg.benchmark), jsonl(problems))
        elif name in ("magicoder", "starcoder2"):
            contaminated = contaminated or contamination()
            rows = tqdm(hub_pairs(name, left_out), desc=name, unit="pair", mininterval=1)
        else:
            rows = stdlib_pairs() if name == "stdlib" else read_pairs(name)
        for row in rows:
            if row["response"] in seen:
                left_out["repeats"] += 1
            elif name in HUB and contaminated(row):
                left_out["with text of HumanEval or MBPP"] += 1
            elif name in HUB and near.seen(row["instruction"] + "\n" + row["response"]):
                left_out["near duplicates"] += 1
            else:
                seen.add(row["response"])
                pairs.append(row)
        print(f"  {name}: {len(pairs) - before:,} pairs; left out: "
              + (", ".join(f"{n:,} {what}" for what, n in left_out.items()) or "none"))
    random.Random(cfg.seed).shuffle(pairs)
    write_whole(Path(cfg.source), jsonl(pairs))


def examples(cfg):
    """Yield (instruction, [responses as (prompt, response) texts]) in the form that is asked for."""
    path = Path(cfg.dest if cfg.form == "edits" else cfg.source)
    if not path.is_file():
        die(f"{path} is missing; " + (f"python lintseq.py --source={cfg.source} --dest={cfg.dest} writes it"
                                      if cfg.form == "edits" else "set instruct=… and run prepare.py once more"))
    for n, line in enumerate(path.open("rb"), 1):
        try:
            row = json.loads(line)
            if cfg.form == "edits":
                yield row["source_instruction"], row["edit_path"]
            else:
                yield row["instruction"], row["response"]
        except (ValueError, KeyError, TypeError) as e:
            die(f"{path}, row {n}: {type(e).__name__}: {e}")


def write_examples(folder, enc, cfg):
    """Tokenize instruction data in the form cfg.form into folder/{train,val}.bin and .examples.npy."""
    tokens = {"train": array("H"), "val": array("H")}  # two bytes a token: five edit sequences a pair are 0.4 GB
    starts, skipped = {"train": [], "val": []}, Counter()
    for instruction, answer in tqdm(examples(cfg), desc="tokenizing", unit="example", mininterval=1):
        split = "val" if held_out(instruction, cfg.val_fraction) else "train"
        head, tail = encode_example(enc, cfg.form, instruction, answer)
        if len(head) + len(tail) > cfg.max_tokens:
            skipped[f"longer than {cfg.max_tokens} tokens"] += 1
            continue
        starts[split].append((len(tokens[split]), len(tokens[split]) + len(head)))
        tokens[split].extend(head + tail)
    meta = {"form": cfg.form, **tokenizer_meta(cfg.tokenizer, enc), "skipped": skipped,
            "sources": [cfg.dest if cfg.form == "edits" else cfg.source]}
    for split in tokens:
        table = np.array(starts[split], dtype=np.int64).reshape(-1, 2)
        meta[split] = {"tokens": len(tokens[split]), "examples": len(table)}
        write_whole(folder / f"{split}.bin", np.array(tokens[split], dtype="<u2").tobytes())
        with open(folder / f"{split}.examples.npy.tmp", "wb") as f:
            np.save(f, table)
        os.replace(folder / f"{split}.examples.npy.tmp", folder / f"{split}.examples.npy")
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())
    return meta


def export(cfg):
    """A checkpoint as a folder that Hugging Face's libraries load: weights, config, tokenizer and a model card."""
    import torch
    from model import GPT
    folder, source = Path(cfg.export) / "hf", Path(cfg.export) / "ckpt.pt"
    if not source.is_file():
        die(f"--export={cfg.export}: it has no ckpt.pt")
    checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    meta, model = checkpoint["meta"], GPT.from_checkpoint(checkpoint)
    enc = get_tokenizer(meta["tokenizer"])
    if fingerprint(enc) != meta["fingerprint"]:
        die(f"{cfg.export} was trained with another {meta['tokenizer']}: put the old file back")
    model.save_pretrained(folder, eos_token_id=enc.eot_token, form=meta["form"])
    write_whole(folder / "tokenizer.json", tokenizer_json(enc).encode())
    write_whole(folder / "tokenizer_config.json", json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT, "clean_up_tokenization_spaces": False,
         "model_max_length": model.config.block_size}, indent=2).encode())
    write_whole(folder / "README.md", model_card(cfg, checkpoint, model).encode())
    print(f"prepare.py: {folder}: {model.num_params():,} parameters, step {checkpoint['step']:,}, {meta['form']}")


def model_card(cfg, checkpoint, model):
    form, name, scores = checkpoint["meta"]["form"], Path(cfg.export).name, ""
    try:
        results = json.loads((Path(cfg.results) / "results.json").read_text())
        for run in results["runs"]:
            if run["model"] == name:
                scores += f"| {Path(results['benchmark']).stem} | {run['temperature']} | " + ", ".join(
                    f"pass@{k} {100 * x['mean']:.1f} ± {100 * x['standard_error']:.1f}" for k, x in run["pass@k"].items()) + " |\n"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    reads = {"edits": f"an instruction, a new line and `{DIFF}`, and writes a sequence of edits (diffs) that put the "
                      "program together", "programs": "an instruction and a new line, and writes a program",
             "text": "text and code, and continues it"}[form]
    settings = "\n".join(f"{k} = {v!r}" for k, v in {**checkpoint["config"], **checkpoint.get("settings", {})}.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [code, lintseq]
---
# {name}

A TinyCodeLM (LintSeq, arXiv 2410.02749) of {model.num_params():,} parameters after {checkpoint['step']:,} steps,
architecture `OlmoForCausalLM`. It reads {reads}.

**Programs written by a model must not be run without precautions**: they can be wrong or harmful. Read them, and run
them in a sandbox without rights, files or network. A model this small makes mistakes in most of what it writes.

## Scores (in %, with a standard error over the problems)

{'| benchmark | temperature | pass@k |' + chr(10) + '|---|---|---|' + chr(10) + scores if scores else 'None measured yet.' + chr(10)}
## The run's configuration

```python
{settings}
```
"""


def main():
    cfg = config.load(Settings)
    try:
        prepare(cfg)
    except OSError as e:
        die(f"{e}; what is written so far is kept" if e.errno else str(e))
    except KeyboardInterrupt:
        die("stopped; the same command goes on")


def prepare(cfg):
    start, folder = time.time(), DATA / cfg.dataset
    if cfg.export:
        return export(cfg)
    if cfg.instruct and RANK == 0 and not Path(cfg.source).is_file():
        print(f"instruction data -> {cfg.source}")
        make_instruct(cfg)
    if not (cfg.corpora or cfg.form) or RANK > 0 and cfg.form:
        return
    if (folder / "meta.json").is_file():
        print(f"{folder} is there already; delete it to make it anew")
        return
    if cfg.tokenizer.endswith(".tiktoken") and RANK == 0 and not Path(cfg.tokenizer).is_file():
        print(f"tokenizer -> {cfg.tokenizer}: a BPE of {cfg.bpe_size} entries")
        train_tokenizer(cfg.tokenizer, tokenizer_texts(cfg), cfg.bpe_size)
    if cfg.tokenizer.endswith(".tiktoken"):
        wait_for([Path(cfg.tokenizer)], "tokenizer")
    try:
        enc = get_tokenizer(cfg.tokenizer)
    except (OSError, ValueError) as e:
        die(f"tokenizer={cfg.tokenizer}: {e}")
    if enc.n_vocab > 2 ** 16:
        die(f"tokenizer={cfg.tokenizer} has {enc.n_vocab:,} entries, and a bin holds numbers of 16 bits")
    print(f"tokens -> {folder}")
    meta = write_examples(folder, enc, cfg) if cfg.form else write_bins(folder, enc, cfg)
    if meta is None:
        return print(f"rank {RANK} is done: {time.time() - start:.1f} s")
    for split in ("train", "val"):
        print(f"  {split}: " + ", ".join(f"{n:,} {what}" for what, n in meta[split].items()))
    for reason, n in meta["skipped"].items():
        print(f"  skipped {n:,}: {reason}")
    print(f"prepare.py: {time.time() - start:.1f} s")


def tokenizer_texts(cfg):
    """What a small tokenizer is trained on: a quarter of the text, and all instructions, each with one edit sequence."""
    for corpus in cfg.corpora:
        for _, text in documents(corpus):
            if text and not held_out(text, cfg.val_fraction) and held_out(text, 0.25 + 0.75 * cfg.val_fraction):
                yield text
    for i, row in enumerate(read_pairs(cfg.source) if cfg.source and Path(cfg.source).is_file() else ()):
        yield row["instruction"]
        try:
            yield "\n".join(lintseq.lintseq(row["response"], random.Random(i)))
        except ValueError:
            pass


if __name__ == "__main__":
    main()
