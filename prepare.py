"""Text to tokens: tokenizers, corpora, instruction data, and the memmapped bins that train.py reads.

    python prepare.py config/demo.py            # a tokenizer, the standard library, small problems
    python prepare.py config/demo_edits.py      # after lintseq.py: edit sequences into a bin
    python prepare.py config/demo_programs.py   # whole programs into a bin, the paper's baseline
    python prepare.py config/150m.py            # FineWeb and The Stack: downloads, then tokens
    python prepare.py --corpora=input.txt --dataset=mine    # any text
    python prepare.py --export=out-150m         # a checkpoint as a Hugging Face model, out-150m/hf

Writes data/<dataset>/{train,val}.bin, raw little-endian uint16 tokens without a header, and
meta.json: tokenizer, counts, sources, what was skipped and why (each in skipped.jsonl).
Instruction data adds {train,val}.examples.npy, int64 (n, 2): where each example and where its
response starts. What is there already is not made again; every file appears whole or not at all; a
run that was killed goes on. Machines that share a file system each take a share (torchrun, srun).
Left out: downloading and tokenizing at once, data that is not on a shared file system, streaming.
"""
import ast
import base64
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import textwrap
import time
import zlib
from array import array
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import config
import lintseq
from config import RANK, WORLD, _demo_problems, die, write_whole

DATA, SPLITS = Path("data"), ("train", "val")
EOT, DIFF = "<|endoftext|>", lintseq.DIFF


class Settings:
    dataset = "demo"  # the folder under data/ that is written
    tokenizer = "p50k_base"  # tiktoken's name, a .tiktoken file (trained if missing), a hub's model
    bpe_size: (256, 65_534) = 1024  # entries of a tokenizer that is trained here
    corpora = ()  # stdlib, fineweb, the-stack (the-stack:9: 9 files), files, folders of files
    instruct = ()  # stdlib, family, magicoder, starcoder2, files with `instruction`, `response`
    source = ""  # the JSONL of instruction and response that `instruct` becomes, for lintseq.py
    dest = ""  # the JSONL of edit sequences that lintseq.py writes
    form: ("edits", "programs", "") = ""  # tokenize instruction data: edits (dest), programs (source)
    benchmark = ""  # where the family's held-out problems go; evaluate.py scores them
    family_size: (1,) = 10_000  # problems of the demo's family to train on
    family_heldout = 200  # and held out
    val_fraction: (0, 0.9) = 0.01  # of the documents or examples, chosen by a hash of their text
    max_tokens: (1,) = 1024  # longest example of instruction data; longer ones are left out
    seed = 1337  # of the family and of the order of examples
    workers = 0  # processes that tokenize; 0: one a CPU
    export = ""  # a folder with ckpt.pt, to be written as a Hugging Face model into its hf/
    results = "out-eval"  # evaluate.py's folder, whose scores go into the model card


# -- Tokenizers -------------------------------------------------------------------------------------

# GPT-4's pattern, changed for small models: a number is one or two digits (never with the space
# before it: copying one is then always copying one token), a new line is one piece with its
# indentation and an edit's "+", and what stands between the numbers of a hunk's header is one piece.
PATTERN = "|".join([
    r"@@ -", r",0 \+", r" @@\n\+ *", r"\n\+? *", r"\p{N}{1,2}",
    r"'(?:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+",
    r"\s+?(?=\n|\S)", r"\s+"])
GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")  # what tokenizers' "ByteLevel" splits by

# GPT-2's way to write any byte as a printable character
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = sorted(set(range(256)) - set(_printable))
LETTERS = {b: chr(b) for b in _printable} | {b: chr(256 + i) for i, b in enumerate(_others)}
BYTES = {letter: b for b, letter in LETTERS.items()}


def get_tokenizer(name):
    """A tiktoken.Encoding with the special tokens <|endoftext|> and <|diff|>, from the name of one
    of tiktoken's own encodings (fetched by tiktoken on first use) or a .tiktoken file: a line per
    token, base64 and rank. Or a PublishedTokenizer, as it is: from a tokenizer.json, a folder with
    one, or the name of a model on the Hugging Face hub. OSError or ValueError if there is none."""
    if Path(name).is_dir():
        name = str(Path(name) / "tokenizer.json")
    elif "/" in name and not name.endswith((".tiktoken", ".json")):
        name = download_file(name, "tokenizer.json")
    if name.endswith(".json"):
        return PublishedTokenizer(name)
    if name.endswith(".tiktoken"):
        lines = map(str.split, Path(name).read_text(encoding="utf-8").splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if {*map(bytes, zip(range(256)))} - {*ranks} or {*ranks.values()} != {*range(len(ranks))}:
            raise ValueError("a byte is missing, or the ranks are not 0, 1, 2, …")
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks), DIFF: len(ranks) + 1})
    try:
        base = tiktoken.get_encoding(name)
    except OSError as e:
        raise OSError(f"tiktoken fetches it from the network at its first use ({type(e).__name__}); "
                      "it keeps it in the folder that TIKTOKEN_CACHE_DIR names") from None
    except ValueError:
        raise ValueError(
            f"neither one of tiktoken's encodings ({', '.join(tiktoken.list_encoding_names())}), nor "
            "a .tiktoken or .json file, nor a Hugging Face model (owner/name)") from None
    return tiktoken.Encoding(
        name + "+diff", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
        special_tokens={EOT: base.eot_token, DIFF: base.n_vocab})


def load_tokenizer(name):
    """get_tokenizer; die where there is none, or where its numbers do not fit into a bin's 16 bits."""
    try:
        enc = get_tokenizer(name)
    except (OSError, ValueError) as e:
        die(f"tokenizer={name}: {e}")
    if enc.n_vocab > 2 ** 16:
        die(f"tokenizer={name} has {enc.n_vocab:,} entries, and a bin holds numbers of 16 bits")
    return enc


class PublishedTokenizer:
    """A byte-level BPE in a tokenizer.json, read by the library `tokenizers`, behind the methods of
    tiktoken.Encoding that we use. <|diff|> is plain text unless the file has it as a token."""

    def __init__(self, path):
        self.source = Path(path).read_text(encoding="utf-8")
        try:
            self.library = import_library("tokenizers").Tokenizer.from_str(self.source)
            self.library.no_truncation()
            self.library.no_padding()
            added = self.library.get_added_tokens_decoder()
            self._special_tokens = {token.content: i for i, token in added.items()}
            self.eot_token = self._special_tokens[EOT]
            self._mergeable_ranks = {
                bytes(BYTES[letter] for letter in token): i
                for token, i in self.library.get_vocab().items() if i not in added}
        except Exception as e:  # the library's errors have no type of their own
            raise ValueError(f"{path} is no byte-level BPE with {EOT}: {e}") from None
        splitter = json.loads(self.source)["pre_tokenizer"]
        splitter = splitter.get("pretokenizers", [splitter])[0]
        self._pat_str = splitter.get("pattern", {}).get("Regex", GPT2_PATTERN)
        self.token_bytes = {i: token for token, i in self._mergeable_ranks.items()}
        self.token_bytes |= {i: token.encode() for token, i in self._special_tokens.items()}
        self.n_vocab = max(self.token_bytes) + 1

    def encode(self, text, *, allowed_special=()):
        """Token ids; special tokens in the text are text, unless allowed_special is "all"."""
        self.library.encode_special_tokens = allowed_special != "all"
        return self.library.encode(text, add_special_tokens=False).ids

    encode_ordinary = encode

    def decode_single_token_bytes(self, token):
        return self.token_bytes[token]

    def decode_bytes(self, tokens):
        return b"".join(self.token_bytes[token] for token in tokens)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")


def fingerprint(enc):
    """16 hex digits that differ for tokenizers that differ: data and checkpoints must agree on it."""
    table = sorted((rank, token) for token, rank in enc._mergeable_ranks.items())
    whole = repr((table, sorted(enc._special_tokens.items()), enc._pat_str))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def train_tokenizer(path, texts, size):
    """Train a byte-level BPE of `size` entries on some texts and write it in tiktoken's form."""
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(texts, size, pattern=PATTERN)
    lines = (f"{base64.b64encode(bytes(token)).decode()} {rank}\n"
             for token, rank in bpe.get_mergeable_ranks())
    write_whole(path, "".join(lines).encode())


def tokenizer_texts(cfg):
    """What a tokenizer is trained on: the corpora (where they are large, a quarter of what is not
    held out), and all instructions, each with one edit sequence."""
    size = sum(os.path.getsize(path) for corpus in cfg.corpora for path in corpus_files(corpus))
    low, high = (cfg.val_fraction, 0.25 + 0.75 * cfg.val_fraction) if size > 4_000_000 else (0, 1)
    for corpus in cfg.corpora:
        yield from (text for _, text in documents(corpus) if low <= hash_text(text) < high)
    for n, row in config.read_rows(cfg.source) if Path(cfg.source).is_file() else ():
        try:
            pair = read_pair(row)
            yield pair["instruction"]
            yield "\n".join(lintseq.lintseq(pair["response"], random.Random(n - 1)))
        except ValueError:
            pass


LONGEST = 1 << 17  # characters: of 2 ** 20 spaces in a row tiktoken's regular expressions die
PARTS = re.compile(rf".{{1,{LONGEST}}}(?<=[A-Za-z])(?=[\n ])|.{{1,{LONGEST}}}", re.S)


def split_long_text(text):
    """A text in parts that give the tokens of the whole: cut where every tokenizer's pattern cuts it
    too, between a letter and a new line or space; anywhere only where there is no such place."""
    return [text] if len(text) <= LONGEST else PARTS.findall(text)


def encode_text(enc, text):
    """enc.encode_ordinary for a text of any length."""
    return [token for part in split_long_text(text) for token in enc.encode_ordinary(part)]


class Marker(str):
    """What we put between texts ourselves: the token that the tokenizer has for it. The same
    characters in a text are text."""


def encode_parts(enc, parts):
    """Token ids of texts and Markers in a row; a Marker without a token of its own is text, too."""
    ids, text = [], ""
    for part in parts:
        if isinstance(part, Marker) and part in enc._special_tokens:
            ids += encode_text(enc, text) + [enc._special_tokens[part]]
            text = ""
        else:
            text += part
    return ids + encode_text(enc, text)


def encode_prompt(enc, form, prompt):
    """What a model of the form "edits", "programs" or "text" reads before it writes: token ids."""
    if form == "edits":
        return encode_parts(enc, (prompt + "\n", Marker(DIFF)))
    return encode_text(enc, prompt + "\n" * (form == "programs" and not prompt[-1:].isspace()))


def encode_example(enc, form, prompt, answer):
    """(prompt, response) of a training example, token ids: lintseq.training_text where the answer is
    an edit path, else the program, behind a new line unless one side has white space already."""
    if form == "edits":
        parts = [part for edit in answer for part in (edit + "\n", Marker(DIFF))]
        return (encode_prompt(enc, form, prompt),
                encode_parts(enc, (*parts, "\n", Marker(DIFF), Marker(EOT))))
    gap = "" if prompt[-1:].isspace() or answer[:1].isspace() else "\n"
    return encode_text(enc, prompt + gap), encode_parts(enc, (answer, Marker(EOT)))


# -- The Hugging Face hub ---------------------------------------------------------------------------

HUB = {  # our name: (dataset, the paths that begin so)
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT/"),
    "the-stack": ("bigcode/the-stack", "data/python/"),
    "magicoder": ("ise-uiuc/Magicoder-OSS-Instruct-75K",
                  "data-oss_instruct-decontaminated.jsonl"),
    "starcoder2": ("bigcode/self-oss-instruct-sc2-exec-filter-50k", "data/"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/"),
    "mbpp": ("google-research-datasets/mbpp", "full/"),
}
TRIES = 6  # the pause between two is doubled each time: half a minute in all


def import_library(name):
    """A library that is needed here only; die if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        die(f"this needs the library {name}: pip install {name}")


def with_retries(call, page):
    """call(), again where what failed may pass. OSError, with the mend, where it does not."""
    for attempt in range(TRIES):
        time.sleep(2 ** attempt - 1 if attempt else 0)
        try:
            return call()
        except OSError as e:
            if e.errno:  # a full disk
                raise
            error, cause, status = str(e).splitlines()[0], e, None
        while cause is not None and status is None:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            cause = cause.__cause__
        if status in (401, 403):
            raise OSError(f"status {status}: it is gated, private or not there: accept the terms on "
                          f"{page} and set HF_TOKEN to a token of that account")
        if status == 404:
            raise FileNotFoundError(f"status 404: no such file; see {page}")
    raise ConnectionError(f"{page}: {error}; the same command goes on from here")


def download_file(repo, path, **where):
    """The local path of a file of a repository on the hub, downloaded if it is not there yet. The
    library sees to the cache (HF_HOME), HF_TOKEN, HF_ENDPOINT and connections that break."""
    hub = import_library("huggingface_hub")
    page = f"{hub.constants.ENDPOINT}/{'datasets/' * ('repo_type' in where)}{repo}"
    return with_retries(lambda: hub.hf_hub_download(repo, path, **where), page)


def list_files(repo, prefix):
    """(commit, [[path, bytes], …]) of the files of a dataset whose path begins with `prefix`."""
    api = import_library("huggingface_hub").HfApi()
    commit = api.dataset_info(repo).sha
    tree = api.list_repo_tree(repo, os.path.dirname(prefix) or None, revision=commit,
                              repo_type="dataset")
    return commit, sorted((file.path, file.size) for file in tree
                          if file.path.startswith(prefix) and file.path.endswith(KINDS))


def download_dataset(name, count=None, share=False):
    """The local paths of the first `count` files of a dataset of HUB. Its listing is kept, so that
    all runs and ranks see the same, and a complete copy needs no network. share: each rank downloads
    its part and waits for the others."""
    (repo, prefix), hub = HUB[name], import_library("huggingface_hub")
    listing = DATA / "hub" / f"{name}.json"
    if RANK == 0 and not listing.is_file():
        files = with_retries(lambda: list_files(repo, prefix),
                             f"{hub.constants.ENDPOINT}/datasets/{repo}")
        write_whole(listing, json.dumps(files).encode())
    wait_for(listing.is_file, "listing")
    commit, files = json.loads(listing.read_text())
    where, files = {"repo_type": "dataset", "revision": commit}, files[:count]

    def missing():
        return [size for path, size in files
                if not isinstance(hub.try_to_load_from_cache(repo, path, **where), str)]

    check_disk_space(Path(hub.constants.HF_HUB_CACHE), f"downloads of {repo}", sum(missing()))
    for path, _ in files[RANK::WORLD] if share else files:
        download_file(repo, path, **where)
    wait_for(lambda: not missing(), "files that other ranks download")
    return [Path(download_file(repo, path, **where)) for path, _ in files]


def wait_for(ready, what):
    """Return when ready(), which other ranks see to, is true."""
    if WORLD > 1 and not ready():
        print(f"  waiting for the {what}", flush=True)
        while not ready():
            time.sleep(1)


def check_disk_space(folder, what, wanted):
    """Say how many bytes are about to be written; die if the disk has not so many."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        die(f"{what}: needs about {wanted / 1e9:,.2f} GB, and {there} has {free / 1e9:,.2f} GB free: "
            "make room, or put a link to a larger disk there")
    if RANK == 0 and wanted:
        print(f"  {what}: about {wanted / 1e9:,.2f} GB, {free / 1e9:,.2f} GB free", flush=True)


# -- Corpora to documents ---------------------------------------------------------------------------

SHARD = 16 << 20  # bytes of text that one worker tokenizes at a time, and a killed run does again
KINDS = (".py", ".txt", ".jsonl", ".jsonl.gz", ".parquet")


def corpus_files(corpus):
    """The files of "stdlib", of a dataset of HUB, of a folder, or the one file."""
    name, _, count = corpus.partition(":")
    root = Path(corpus)
    if corpus == "stdlib":
        return _demo_problems.stdlib_files()
    if name in HUB and not root.exists():
        return download_dataset(name, int(count) if count.isdigit() else None, share=True)
    files = [root] if root.is_file() else sorted(
        path for path in root.rglob("*") if path.name.endswith(KINDS) and path.is_file())
    if not files:
        die(f"corpora: {corpus} is neither stdlib, fineweb, the-stack, nor a file, nor a folder with "
            + " ".join(KINDS))
    return files


def split_file(path):
    """[(path, begin, end, bytes of text, about)]: what of a file can be read on its own. Row groups
    of Parquet, ranges of bytes of a JSONL (a row belongs to that it begins in), else all of it."""
    name, size = str(path), os.path.getsize(path)
    if name.endswith(".parquet"):
        try:
            meta = config.open_parquet(name).metadata
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        except (OSError, ValueError):
            sizes = [size]  # read_span says what is wrong
        return [(name, i, i + 1, size) for i, size in enumerate(sizes)]
    step = SHARD if name.endswith(".jsonl") else max(1, size)
    return [(name, at, min(at + step, size), min(step, size - at))
            for at in range(0, max(1, size), step)]


def read_span(name, begin, end):
    """Yield (name of a document, its text, or the ValueError that says why there is none)."""
    read = (read_parquet if name.endswith(".parquet") else
            read_jsonl if name.endswith((".jsonl", ".jsonl.gz")) else read_text)
    try:
        for where, text in read(name, begin, end):
            try:
                text = text.decode() if isinstance(text, bytes) else text
            except UnicodeDecodeError:
                text = ValueError("not UTF-8")
            yield where, ValueError("no text") if text is None else text or ValueError("empty")
    except UnicodeDecodeError:
        yield name, ValueError("not UTF-8")
    except (OSError, EOFError, ValueError, NotImplementedError, MemoryError, zlib.error) as e:
        # pyarrow's errors are among these
        reason = (str(e).splitlines() or ["out of memory"])[0][:200]
        yield name, ValueError(f"unreadable {Path(name).suffix[1:]}: {reason}")


def read_parquet(name, begin, end):
    import pyarrow
    file = config.open_parquet(name)
    columns = [c for c in ("text", "content") if c in file.schema_arrow.names]
    if not columns:
        raise ValueError(f"no column text or content, but {', '.join(file.schema_arrow.names)}")
    row = sum(file.metadata.row_group(i).num_rows for i in range(begin))
    for batch in file.iter_batches(16, row_groups=range(begin, end), columns=columns[:1],
                                   use_threads=False):  # 16 rows are in memory at a time
        for row, text in enumerate(batch.column(0).cast(pyarrow.large_binary()), row + 1):
            yield f"{name}:{row}", text.as_py()


def read_jsonl(name, begin, end):
    with config.open_lines(name) as f:
        if begin:  # the row that this range begins in is the one before's, unless it begins here
            f.seek(begin - 1)
            f.readline()
        while f.tell() < end or name.endswith(".gz"):
            at, line = f.tell(), f.readline()
            if not line:
                break
            if line.strip():
                try:
                    row = config.parse_row(line)
                    text = row.get("text", row.get("content"))
                    yield f"{name}, byte {at}", text if isinstance(text, str) else None
                except ValueError as e:
                    yield f"{name}, byte {at}", e


def read_text(name, begin, end):
    with open(name, encoding="utf-8-sig") as f:
        yield name, f.read(SHARD // 2) + f.readline(SHARD // 2)
        while text := f.read(SHARD // 2):  # a long text becomes several documents
            yield name, text + f.readline(SHARD // 2)


def documents(corpus):
    """Yield (name, text) of a corpus, without what cannot be read."""
    for path in corpus_files(corpus):
        for *span, _ in split_file(path):
            yield from (row for row in read_span(*span) if isinstance(row[1], str))


def hash_text(text):
    """A number in [0, 1) that decides by the text alone whether it belongs to the validation set."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2 ** 64


# -- Documents to bins ------------------------------------------------------------------------------

def plan_shards(corpora):
    """[[bytes of text, [[path, begin, end], …]], …], each of about SHARD bytes."""
    shards = [[0, []]]
    for span in (span for corpus in corpora for path in corpus_files(corpus)
                 for span in split_file(path)):
        name, begin, end, size = span
        if shards[-1][0] and shards[-1][0] + size > SHARD:
            shards.append([0, []])
        shards[-1][0] += size
        spans = shards[-1][1]
        if spans and spans[-1][::2] == [name, begin]:
            spans[-1][2] = end  # the next row group: a file is opened once for all of them
        else:
            spans.append([name, begin, end])
    return shards


def start_tokenizing(tokenizer):
    """What each worker does first: its tokenizer, and a bound of 1.5 GB more than it has now. What
    does not fit, as a page of Parquet of 1 GB, is then skipped and listed."""
    global _enc
    _enc = get_tokenizer(tokenizer)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + (1536 << 20), most))


def tokenize_shard(stem, spans, val_fraction):
    """Write the tokens of the spans' documents, each followed by end-of-text, into two files; then
    `stem`.json, which says which they are, how many documents they hold, and what was skipped."""
    names = [f"{stem}.{os.getpid()}.{split}" for split in SPLITS]
    counts, skipped = [0, 0], []
    with open(names[0], "wb") as train, open(names[1], "wb") as val:
        for name, text in (document for span in spans for document in read_span(*span)):
            if isinstance(text, ValueError):
                skipped.append([name, str(text)])
                continue
            held_out = hash_text(text) < val_fraction
            for part in split_long_text(text):
                np.array(_enc.encode_ordinary(part), "<u2").tofile(val if held_out else train)
            np.array(_enc.eot_token, "<u2").tofile(val if held_out else train)
            counts[held_out] += 1
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    write_whole(f"{stem}.json", json.dumps([names, counts, skipped]).encode())


def write_bins(folder, enc, cfg):
    """Tokenize cfg.corpora into folder/{train,val}.bin, shard by shard, in folder/shards until all
    are done: shard i is rank i % WORLD's, and the bins are the shards in their order, whoever made
    them, and however often the run was killed."""
    shards, place = plan_shards(cfg.corpora), folder / "shards"
    plan = json.dumps([fingerprint(enc), cfg.val_fraction, shards]).encode()
    if (place / "plan.json").is_file() and (place / "plan.json").read_bytes() != plan:
        die(f"{place} was begun with other corpora, tokenizer or val_fraction: set them back, or "
            "delete it")
    write_whole(place / "plan.json", plan)
    # shards and bins are two copies for a while: of two bytes for each four of text, or less
    there = sum(path.stat().st_size for path in place.iterdir())
    check_disk_space(folder, f"tokens, in {len(shards)} shards",
                     max(0, sum(size for size, _ in shards) - there))

    start, stems, jobs = time.time(), [f"{place}/{i:06}" for i in range(len(shards))], {}
    pool = config.start_pool(min(len(shards), cfg.workers or config.CPUS), start_tokenizing,
                             cfg.tokenizer)
    for stem, (size, spans) in [*zip(stems, shards)][RANK::WORLD]:
        if not Path(f"{stem}.json").is_file():
            jobs[pool.submit(tokenize_shard, stem, spans, cfg.val_fraction)] = size
    with tqdm(total=sum(jobs.values()), desc="tokenizing", unit="B", unit_scale=True) as bar:
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update(jobs[job])
        finally:
            pool.shutdown(cancel_futures=True)
    if RANK == 0:
        wait_for(lambda: all(Path(f"{stem}.json").is_file() for stem in stems), "other ranks' shards")
        join_shards(folder, stems, enc, cfg)
        shutil.rmtree(place)
    print(f"  tokenized in {time.time() - start:.1f} s")


def join_shards(folder, stems, enc, cfg):
    """Lay the shards' tokens end to end in folder/{train,val}.bin. Where there are too few documents
    to hold out one, the end of the tokens is held out."""
    names, counts, skipped = zip(*(json.loads(Path(f"{stem}.json").read_text()) for stem in stems))
    counts, skipped = [sum(split) for split in zip(*counts)], sum(skipped, [])
    bins = [folder / f"{split}.bin" for split in SPLITS]
    for bin, parts in zip(bins, zip(*names)):
        with open(f"{bin}.tmp", "wb") as out:
            for part in parts:
                with open(part, "rb") as tokens:
                    shutil.copyfileobj(tokens, out, 1 << 24)
            out.flush()
            os.fsync(out.fileno())
        os.replace(f"{bin}.tmp", bin)
    if cfg.val_fraction and (sum(counts) * cfg.val_fraction < 1 or 0 in counts):
        tokens = np.concatenate([np.fromfile(bin, "<u2") for bin in bins])
        n = max(int(len(tokens) * cfg.val_fraction), min(len(tokens) // 10, 4096))
        print(f"  {sum(counts)} documents are too few to hold out some: the last {n:,} tokens are")
        for bin, part in zip(bins, np.split(tokens, [len(tokens) - n])):
            write_whole(bin, part.tobytes())
    write_meta(folder, enc, cfg, cfg.corpora, "documents", counts, skipped)


def write_meta(folder, enc, cfg, sources, what, counts, skipped):
    """Write folder/meta.json, which says that the data is complete: the tokenizer, tokens and
    documents (or examples) of both splits, sources, what was skipped; and skipped.jsonl. Say it."""
    write_jsonl(folder / "skipped.jsonl", skipped)
    meta = {"form": cfg.form or "text", "tokenizer": cfg.tokenizer, "fingerprint": fingerprint(enc),
            "vocab_size": enc.n_vocab, "sources": sources, "skipped": count_reasons(skipped)}
    for split, count in zip(SPLITS, counts):
        tokens = os.path.getsize(folder / f"{split}.bin") // 2
        meta[split] = {"tokens": tokens, what: count}
        print(f"  {split}: {tokens:,} tokens, {count:,} {what}")
    for reason, n in meta["skipped"].items():
        print(f"  skipped {n:,}: {reason}")
    if not meta["train"]["tokens"]:
        die(f"nothing to train on in {', '.join(sources)}: {folder}/skipped.jsonl says what was skipped")
    if not meta["val"]["tokens"]:
        print("  nothing is held out: there will be no validation loss")
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())


def write_jsonl(path, rows):
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def count_reasons(skipped):
    """{reason, without its details: how many}"""
    return Counter(reason.partition(":")[0] for _, reason in skipped)


# -- Instruction pairs ------------------------------------------------------------------------------

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)


def code_of(text):
    """The Python of an answer in Markdown: the contents of its python fences (of the bare ones, if
    there are none), joined; a text without fences if it is Python; else ""."""
    blocks = [(language.lower(), textwrap.dedent(code).strip("\n"))
              for language, code in FENCE.findall(text)]
    codes = ([code for language, code in blocks if language in ("python", "python3", "py")]
             or [code for language, code in blocks if not language])
    if not blocks:
        try:
            ast.parse(text)
            codes = [text.strip("\n")]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    code = "\n".join(codes)
    return code + "\n" if code.strip() else ""


def read_pair(row, markdown=False):
    """{instruction, response} of a row; ValueError, with the reason, where it has none. markdown: of
    Magicoder's or StarCoder2's data, Python only, without its Markdown."""
    if isinstance(row, ValueError):
        raise row
    instruction = row.get("instruction", row.get("problem"))
    response = row.get("response", row.get("solution"))
    if not isinstance(instruction, str) or not isinstance(response, str):
        raise ValueError("no instruction and response")
    if markdown and row.get("lang", "python") != "python":
        raise ValueError("of another language")
    if markdown:
        instruction, response = instruction.strip(), code_of(response)
    if not response.strip():
        raise ValueError("without code")
    return {"instruction": instruction, "response": response}


def instruct_rows(name, cfg):
    """Yield (where, row) of one of cfg.instruct, for read_pair."""
    if name == "stdlib":
        yield from ((name, pair) for pair in _demo_problems.stdlib_pairs())
    elif name == "family":
        pairs, problems = _demo_problems.family(cfg.family_size, cfg.family_heldout, cfg.seed)
        write_jsonl(cfg.benchmark, problems)
        yield from ((name, pair) for pair in pairs)
    else:
        for path in download_dataset(name) if name in HUB else [name]:
            for n, row in config.read_rows(path):
                yield f"{path}:{n}", row


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def contamination_test():
    """A test for a text: does it hold ten words in a row of a HumanEval or MBPP problem's text (all
    of them, where it has six to nine), or all the words of its solution (ten or more)? A word is a
    run of letters, in lower case."""
    known = {}  # the first six words: sequences that begin so
    for name, text, solution in (("humaneval", "prompt", "canonical_solution"),
                                 ("mbpp", "text", "code")):
        for path in download_dataset(name):
            for _, row in config.read_rows(path):
                text_words, code_words = words(row[text]), words(row[solution])
                n = max(6, min(10, len(text_words)))
                sequences = [text_words[i:i + n] for i in range(len(text_words) - n + 1)]
                for sequence in sequences + [code_words] * (len(code_words) >= 10):
                    known.setdefault(tuple(sequence[:6]), set()).add(" ".join(sequence))

    def is_contaminated(text):
        mine = words(text)
        whole = f" {' '.join(mine)} "
        return any(f" {sequence} " in whole for i in range(len(mine))
                   for sequence in known.get(tuple(mine[i:i + 6]), ()))
    return is_contaminated


def near_duplicate_test():
    """A test for a text: does it share 70% of its runs of five words and signs with one before it
    (The Stack's measure)? Candidates by MinHash, 64 hashes in 16 bands of 4; then Jaccard's index."""
    kept, bands = [], {}
    a, b = np.random.default_rng(0).integers(1, 2 ** 63, (2, 64, 1), dtype=np.uint64)

    def is_near_duplicate(text):
        parts = re.findall(r"\w+|[^\w\s]", text.lower())
        runs = np.unique([zlib.crc32(" ".join(parts[i:i + 5]).encode())
                          for i in range(max(1, len(parts) - 4))]).astype(np.uint64)
        signature = (((a | 1) * runs + b) >> 32).min(1).reshape(16, 4)
        places = [bands.setdefault((i, bytes(band)), []) for i, band in enumerate(signature)]
        for other in {n for place in places for n in place}:
            shared = len(np.intersect1d(runs, kept[other], assume_unique=True))
            if shared >= 0.7 * (len(runs) + len(kept[other]) - shared):
                return True
        for place in places:
            place.append(len(kept))
        kept.append(runs)
        return False
    return is_near_duplicate


def write_instruct(cfg):
    """Write cfg.source (pairs) and, with the family, cfg.benchmark (its held-out problems). Repeated
    responses go; of the hub's data near duplicates and what the benchmarks hold go too."""
    pairs, skipped, seen, tests = [], [], set(), {}
    for name in cfg.instruct:
        if name in HUB and not tests:
            tests = {"with text of HumanEval or MBPP": contamination_test(),
                     "near duplicates": near_duplicate_test()}
        before, left_out = len(pairs), len(skipped)
        for where, row in tqdm(instruct_rows(name, cfg), desc=name, unit="row", mininterval=1):
            try:
                pair = read_pair(row, markdown=name in HUB)
                if pair["response"] in seen:
                    raise ValueError("repeats")
                for reason, test in tests.items() if name in HUB else ():
                    if test(pair["instruction"] + "\n" + pair["response"]):
                        raise ValueError(reason)
            except ValueError as e:
                skipped.append([where, str(e)])
                continue
            seen.add(pair["response"])
            pairs.append(pair)
        print(f"  {name}: {len(pairs) - before:,} pairs; left out: " + (", ".join(
            f"{n:,} {what}" for what, n in count_reasons(skipped[left_out:]).items()) or "none"))
    random.Random(cfg.seed).shuffle(pairs)
    write_jsonl(f"{cfg.source}.skipped.jsonl", skipped)
    write_jsonl(cfg.source, pairs)


# -- Examples to bins -------------------------------------------------------------------------------

def read_example(row, form):
    """(prompt, answer) of a row of edits or pairs; ValueError where it has none."""
    if form == "programs":
        pair = read_pair(row)
        return pair["instruction"], pair["response"]
    if isinstance(row, ValueError):
        raise row
    prompt, edits = row.get("source_instruction"), row.get("edit_path")
    if not (isinstance(prompt, str) and isinstance(edits, list) and edits
            and all(isinstance(edit, str) for edit in edits)):
        raise ValueError("no source_instruction and edit_path")
    return prompt, edits


def write_examples(folder, enc, cfg):
    """Tokenize instruction data in the form cfg.form into folder/{train,val}.bin, .examples.npy."""
    path = examples_file(cfg)
    splits, skipped = [(array("H"), []) for _ in SPLITS], []  # tokens, where each example begins
    for n, row in tqdm(config.read_rows(path), desc="tokenizing", unit="example", mininterval=1):
        try:
            instruction, answer = read_example(row, cfg.form)
            prompt, response = encode_example(enc, cfg.form, instruction, answer)
            if len(prompt) + len(response) > cfg.max_tokens:
                raise ValueError(f"longer than {cfg.max_tokens} tokens")
        except ValueError as e:
            skipped.append([f"{path}:{n}", str(e)])
            continue
        tokens, starts = splits[hash_text(instruction) < cfg.val_fraction]
        starts.append((len(tokens), len(tokens) + len(prompt)))
        tokens.extend(prompt + response)
    for split, (tokens, starts) in zip(SPLITS, splits):
        write_whole(folder / f"{split}.bin", np.array(tokens, "<u2").tobytes())
        table = io.BytesIO()
        np.save(table, np.array(starts, np.int64).reshape(-1, 2))
        write_whole(folder / f"{split}.examples.npy", table.getvalue())
    write_meta(folder, enc, cfg, [path], "examples", [len(starts) for _, starts in splits], skipped)


# -- Export -----------------------------------------------------------------------------------------

def tokenizer_json(enc):
    """The text of a tokenizer.json that gives `enc`'s ids, for Hugging Face's libraries."""
    if isinstance(enc, PublishedTokenizer):
        return enc.source
    tokenizers, ranks = import_library("tokenizers"), enc._mergeable_ranks
    spelled = {token: "".join(LETTERS[b] for b in token) for token in ranks}
    merges = [(spelled[token[:i]], spelled[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocab = {spelled[token]: i for token, i in ranks.items()} | enc._special_tokens
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(enc._pat_str), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(list(enc._special_tokens))
    return library.to_str()


def export(cfg):
    """A checkpoint as a folder that Hugging Face's libraries load: weights, config, tokenizer, card."""
    import torch
    from model import GPT
    folder, source = Path(cfg.export) / "hf", Path(cfg.export) / "ckpt.pt"
    if not source.is_file():
        die(f"--export={cfg.export}: it has no ckpt.pt")
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        meta, model = checkpoint["meta"], GPT.from_checkpoint(checkpoint)
    except Exception as e:
        die(f"{source} is no whole checkpoint of train.py: {str(e).splitlines()[0]}")
    enc = load_tokenizer(meta["tokenizer"])
    if fingerprint(enc) != meta["fingerprint"]:
        die(f"{cfg.export} was trained with another {meta['tokenizer']}: put the old file back")
    model.save_pretrained(folder, eos_token_id=enc.eot_token, form=meta["form"])
    write_whole(folder / "tokenizer.json", tokenizer_json(enc).encode())
    write_whole(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.block_size}, indent=2).encode())
    write_whole(folder / "README.md", model_card(cfg, checkpoint, model).encode())
    print(f"prepare.py: {folder}: {model.num_params():,} parameters, step {checkpoint['step']:,}, "
          f"{meta['form']}")


def model_card(cfg, checkpoint, model):
    """The model's README.md: what it reads and writes, a warning, its scores, its configuration."""
    name, scores = Path(cfg.export).name, []
    try:
        results = json.loads((Path(cfg.results) / "results.json").read_text())
        benchmark = Path(results["benchmark"]).stem
        for run in results["runs"]:
            if run["model"] == name:
                scores.append(f"| {benchmark} | {run['temperature']} | " + ", ".join(
                    f"pass@{k} {100 * score['mean']:.1f} ± {100 * score['standard_error']:.1f}"
                    for k, score in run["pass@k"].items()) + " |")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no scores
    head = ["| benchmark | temperature | pass@k |", "|---|---|---|"]
    table = "\n".join(head + scores) if scores else "None measured yet."
    reads = {"edits": f"an instruction, a new line and `{DIFF}`, and writes a sequence of edits "
                      "(diffs) that put the program together",
             "programs": "an instruction and a new line, and writes a program",
             "text": "text and code, and continues it"}[checkpoint["meta"]["form"]]
    settings = {**checkpoint["config"], **checkpoint.get("settings", {})}
    settings = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [code, lintseq]
---
# {name}

A TinyCodeLM (LintSeq, arXiv 2410.02749) of {model.num_params():,} parameters after
{checkpoint['step']:,} steps, architecture `OlmoForCausalLM`. It reads {reads}.

**Programs written by a model must not be run without precautions**: they can be wrong or harmful.
Read them, and run them in a sandbox without rights, files or network. A model this small makes
mistakes in most of what it writes.

## Scores (in %, with a standard error over the problems)

{table}

## The run's configuration

```python
{settings}
```
"""


# -- The command ------------------------------------------------------------------------------------

def examples_file(cfg):
    """The file that holds the examples of cfg.form; die if it is not there."""
    key = "dest" if cfg.form == "edits" else "source"
    path = getattr(cfg, key)
    if not Path(path).is_file():
        die(f"form={cfg.form} reads {key}={path}, which is not there; " + (
            f"python lintseq.py --source={cfg.source} --dest={cfg.dest} writes it"
            if cfg.form == "edits" else "instruct=… says what to make it from"))
    return path


def main():
    cfg = config.load(Settings)
    start, folder = time.time(), DATA / cfg.dataset
    if cfg.export:
        return export(cfg)
    if not (cfg.corpora or cfg.instruct or cfg.form):
        die("nothing to prepare: give a config file, as in python prepare.py config/demo.py, or "
            "--corpora=… (files of text); --help lists the keys", 2)
    folder.mkdir(parents=True, exist_ok=True)
    lock = config.lock_file(folder / f".lock{RANK}")  # noqa: F841  (held to the end)
    if cfg.instruct and RANK == 0 and not Path(cfg.source).is_file():
        print(f"instruction data -> {cfg.source}")
        write_instruct(cfg)
        if cfg.form == "edits" and not Path(cfg.dest).is_file():
            return print(f"next: python lintseq.py, which makes {cfg.dest} of it")
    if not (cfg.corpora or cfg.form) or RANK > 0 and cfg.form:
        return
    if (folder / "meta.json").is_file():
        return print(f"{folder} is there already; delete it to make it anew")
    if cfg.form:
        examples_file(cfg)
    if cfg.tokenizer.endswith(".tiktoken"):
        if RANK == 0 and not Path(cfg.tokenizer).is_file():
            print(f"tokenizer -> {cfg.tokenizer}: a BPE of {cfg.bpe_size} entries")
            train_tokenizer(cfg.tokenizer, tokenizer_texts(cfg), cfg.bpe_size)
        wait_for(Path(cfg.tokenizer).is_file, "tokenizer")
    enc = load_tokenizer(cfg.tokenizer)
    print(f"tokens -> {folder}")
    (write_examples if cfg.form else write_bins)(folder, enc, cfg)
    print(f"prepare.py: {time.time() - start:.1f} s")


if __name__ == "__main__":
    config.run(main)
