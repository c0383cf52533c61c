"""Text to tokens: tokenizers, corpora, instruction data, the memmapped bins that train.py reads.

    python prepare.py config/demo.py            # a tokenizer, the standard library, small problems
    python prepare.py config/demo_edits.py      # after lintseq.py: edit sequences into a bin
    python prepare.py config/demo_programs.py   # whole programs into a bin, the paper's baseline
    python prepare.py config/150m.py            # FineWeb and The Stack: downloads, then tokens
    python prepare.py --corpora=input.txt --dataset=mine    # any text
    python prepare.py --export=out-150m         # a checkpoint as a Hugging Face model, out-150m/hf

Writes data/<dataset>/{train,val}.bin, raw little-endian uint16 tokens without a header, and
meta.json: tokenizer, counts, sources, what was skipped and why (each in skipped.jsonl).
Instruction data adds {train,val}.examples.npy, int64 (n, 2): where each example and where its
response starts. meta.json comes last: where it is, all is whole, and is not made again; a run that
was killed goes on. Machines that share a file system each take a share of the corpora (torchrun,
srun); instruction data is rank 0's. Memory: of corpora a few times the longest document for each
worker, of instruction data all of it; disk: the tokens twice, until they are joined.
Left out: downloading and tokenizing at once, data that is not on a shared file system, streaming.
"""
import ast
import base64
import glob
import io
import itertools
import json
import os
import random
import re
import shutil
import textwrap
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from tqdm import tqdm

import config
import lintseq
from config import RANK, WORLD, _demo_problems, die, digest, say, write_jsonl, write_whole
from lintseq import DIFF, EOT

DATA, SPLITS = Path("data"), ("train", "val")


class Settings:
    dataset = "pretrain"  # the folder under data/ that is written
    tokenizer = "p50k_base"  # tiktoken's name, .tiktoken (trained if missing), .json, a hub's
    bpe_size: (256, 65_534) = 1024  # entries of a tokenizer that is trained (its file is missing)
    corpora = ()  # stdlib, fineweb, the-stack (the-stack:9: 9 files), files, folders of files
    instruct = ()  # stdlib, family, magicoder, starcoder2, files with `instruction`, `response`
    source = ""  # the JSONL of instruction and response that `instruct` becomes, for lintseq.py
    dest = ""  # the JSONL of edit sequences that lintseq.py wrote, read here
    form: Literal["", "edits", "programs"] = ""  # examples of dest, or of source; "": text
    benchmark = "data/problems.jsonl"  # where the family's held-out problems go, for evaluate.py
    family_size = 10_000  # problems of the demo's family to train on
    family_heldout = 200  # and held out
    val_fraction: (0, 0.9) = 0.01  # held out, by a hash of the text, of an example's instruction
    max_tokens = 1024  # longest example of instruction data; longer ones are left out
    seed = 1337  # of the family and of the order of examples
    workers = 0  # processes that tokenize; 0: one a CPU
    export = ""  # a folder with ckpt.pt, to be written as a Hugging Face model into its hf/
    results = "out-eval"  # evaluate.py's folder: the scores anywhere in it go into the model card


# -- Tokenizers -----------------------------------------------------------------------------------

# GPT-4's pattern, changed for small models: a number is one or two digits (never with the space
# before it: copying one is then always copying one token), a new line is one piece with its
# indentation and an edit's "+", and what stands between a hunk header's numbers is one piece.
PATTERN = "|".join([
    r"@@ -", r",0 \+", r" @@\n\+ *", r"\n\+? *", r"\p{N}{1,2}",
    r"'(?:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+",
    r"\s+?(?=\n|\S)", r"\s+"])
# what tokenizers' "ByteLevel" splits by
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's way to write any byte as a printable character
_unprintable = [b for b in range(256) if not (33 <= b < 127 or 161 <= b != 173)]
LETTERS = {b: chr(256 + _unprintable.index(b) if b in _unprintable else b) for b in range(256)}
BYTES = {letter: b for b, letter in LETTERS.items()}


def get_tokenizer(name):
    """A tiktoken.Encoding with the special tokens <|endoftext|> and <|diff|>, from the name of one
    of tiktoken's own encodings (fetched by tiktoken on first use) or a .tiktoken file that
    train_tokenizer wrote (it splits by PATTERN): a line per token, base64 and rank. Or a
    PublishedTokenizer, as it is: from a tokenizer.json, or the name of a model on the Hugging Face
    hub. OSError or ValueError if there is none."""
    if "/" in name and not name.endswith((".tiktoken", ".json")):
        name = ask_hub("hf_hub_download", name, "tokenizer.json")
    if name.endswith(".json"):
        return PublishedTokenizer(name)
    if name.endswith(".tiktoken"):
        lines = map(str.split, Path(name).read_text(encoding="utf-8").splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if {*ranks.values()} != {*range(max(256, len(ranks)))}:
            raise ValueError("its ranks are not 0, 1, 2, … 255 and on")
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks), DIFF: len(ranks) + 1})
    try:
        base = tiktoken.get_encoding(name)
    except Exception as e:  # no such name, no network
        raise ValueError(
            f"tiktoken does not have it ({type(e).__name__}): it fetches its own encodings "
            f"({', '.join(tiktoken.list_encoding_names())}) from the network at their first use "
            "into the folder that TIKTOKEN_CACHE_DIR names; else give a .tiktoken or .json file, "
            "or a Hugging Face model (owner/name)") from None
    return tiktoken.Encoding(
        name, pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
        special_tokens={EOT: base.eot_token, DIFF: base.n_vocab})


class PublishedTokenizer:
    """A byte-level BPE in a tokenizer.json, read by the library `tokenizers`, behind the methods of
    tiktoken.Encoding that we use. <|diff|> is plain text unless the file has it as a token."""
    _pat_str = GPT2_PATTERN  # for the fingerprint

    def __init__(self, path):
        from tokenizers import Tokenizer
        try:
            self.bpe = Tokenizer.from_file(path)
            self.bpe.no_truncation()
            self.bpe.no_padding()
            self._special_tokens = {
                token.content: i for i, token in self.bpe.get_added_tokens_decoder().items()}
            self.eot_token = self._special_tokens[EOT]
            self._mergeable_ranks = {
                bytes(map(BYTES.__getitem__, token)): i for token, i
                in self.bpe.get_vocab().items() if token not in self._special_tokens}
        except Exception as e:  # the library's errors have no type of their own
            raise ValueError(f"{path}: no byte-level BPE with {EOT} ({e})") from None
        token_bytes = {i: token for token, i in self._mergeable_ranks.items()} | {
            i: token.encode() for token, i in self._special_tokens.items()}
        self.decode_single_token_bytes = token_bytes.__getitem__
        self.n_vocab = max(token_bytes) + 1

    def encode(self, text, *, allowed_special=()):
        """Token ids; special tokens in the text are text, unless allowed_special is "all"."""
        self.bpe.encode_special_tokens = allowed_special != "all"
        return self.bpe.encode(text, add_special_tokens=False).ids

    encode_ordinary = encode

    def decode_bytes(self, tokens):
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode(errors="replace")


def fingerprint(enc):
    """16 hex digits, others for another tokenizer: data and checkpoints must agree on them."""
    ranks = sorted((rank, token) for token, rank in enc._mergeable_ranks.items())
    return digest(repr((ranks, sorted(enc._special_tokens.items()), enc._pat_str)))


def load_tokenizer(info):
    """The tokenizer that a model with this .info was trained with; of a published one, which has
    none, the fingerprint goes in there. As get_tokenizer; ValueError if its file is another now."""
    enc = get_tokenizer(info["tokenizer"])
    found = fingerprint(enc)
    if info.setdefault("fingerprint", found) != found:
        raise ValueError(
            f"the model was trained with another {info['tokenizer']}: put the old file back")
    return enc


def train_tokenizer(path, texts, size):
    """Train a byte-level BPE of `size` entries on some texts and write it in tiktoken's form."""
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(texts, size, pattern=PATTERN)
    ranks = bpe.get_mergeable_ranks()
    if len(ranks) == 256 < size:
        die("no text to train a tokenizer on")
    lines = (f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks)
    write_whole(path, "".join(lines).encode())


def tokenizer_texts(cfg):
    """What a tokenizer is trained on: the corpora (where they are large, a quarter of what is not
    held out), and all instructions, each with one edit sequence."""
    size = sum(os.path.getsize(path) for corpus in cfg.corpora for path in corpus_files(corpus))
    low, high = (cfg.val_fraction, 0.25 + 0.75 * cfg.val_fraction) if size > 4_000_000 else (0, 1)
    for corpus in cfg.corpora:
        yield from (text for _, text in read_documents(corpus) if low <= hash_text(text) < high)
    for n, row in config.read_rows(cfg.source) if Path(cfg.source).is_file() else ():
        try:
            instruction, response = config.read_pair(row)
            yield instruction
            yield "\n".join(lintseq.lintseq(response, random.Random(n - 1)))
        except Exception:  # no pair, no Python, too deep for the parser: lintseq.py lists them
            pass


def make_tokenizer(cfg):
    """The tokenizer cfg.tokenizer; a .tiktoken file that is missing is trained. Die where there is
    none, or where its numbers do not fit into a bin."""
    if cfg.tokenizer.endswith(".tiktoken"):
        if RANK == 0 and not Path(cfg.tokenizer).is_file():
            train_tokenizer(cfg.tokenizer, tokenizer_texts(cfg), cfg.bpe_size)
        wait_for(Path(cfg.tokenizer).is_file)
    try:
        enc = get_tokenizer(cfg.tokenizer)
        if enc.n_vocab > 2 ** 16:
            raise ValueError(f"it has {enc.n_vocab:,} entries, and a bin holds numbers of 16 bits")
    except (OSError, ValueError) as e:
        die(f"tokenizer={cfg.tokenizer}: {e}")
    say(f"  tokenizer {cfg.tokenizer}: {enc.n_vocab:,} entries")
    return enc


# Parts of at most 128 K characters (of 1 M spaces in a row tiktoken's regular expressions die) that
# give the tokens of the whole: cut between a letter and a new line or space, where every
# tokenizer's pattern cuts too; anywhere only where there is no such place.
PARTS = re.compile(r".{1,131072}(?:\Z|(?<=[A-Za-z])(?=[\n ]))|.{1,131072}", re.S)


def encode_text(enc, text):
    """enc.encode_ordinary for a text of any length."""
    return [token for part in PARTS.findall(text) for token in enc.encode_ordinary(part)]


class Marker(str):
    """What we put between texts ourselves: the token that the tokenizer has for it. The same
    characters in a text are text."""


def encode_parts(enc, parts):
    """Token ids of texts and Markers in a row; a Marker without a token of its own is text, too."""
    ids = []
    for is_token, group in itertools.groupby(
            parts, lambda part: isinstance(part, Marker) and part in enc._special_tokens):
        ids += (map(enc._special_tokens.get, group) if is_token
                else encode_text(enc, "".join(group)))
    return ids


def encode_prompt(enc, form, prompt):
    """What a model of the form "edits", "programs" or "text" reads before it writes: token ids."""
    if form == "edits":
        return encode_parts(enc, (prompt + "\n", Marker(DIFF)))
    return encode_text(enc, prompt + "\n" * (form == "programs" and not prompt[-1:].isspace()))


def encode_example(enc, form, prompt, answer):
    """(prompt, response) of a training example, token ids. Of an edit path as published: each edit
    behind a marker of its own, two bare markers at the end, end-of-text. Else of a program, behind
    a new line unless one side has white space already."""
    parts = [answer]
    if form == "edits":
        parts = [part for edit in answer for part in (edit + "\n", Marker(DIFF))]
        parts += ["\n", Marker(DIFF)]
    elif answer[:1].isspace():
        form = "text"
    return encode_prompt(enc, form, prompt), encode_parts(enc, (*parts, Marker(EOT)))


# -- The Hugging Face hub -------------------------------------------------------------------------

HUB = {  # our name: (dataset, the paths that begin so)
    # corpora
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT/"),
    "the-stack": ("bigcode/the-stack", "data/python/"),
    # instruction data; FIELDS has the columns
    "magicoder": ("ise-uiuc/Magicoder-OSS-Instruct-75K",
                  "data-oss_instruct-decontaminated.jsonl"),
    "starcoder2": ("bigcode/self-oss-instruct-sc2-exec-filter-50k", "data/"),
    # benchmarks, for contamination_test alone: evaluate.py downloads its own
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/"),
    "mbpp": ("google-research-datasets/mbpp", "full/"),
}
TRIES = 6  # the pause before each is twice the one before: a minute in all


def ask_hub(function, repo, *args, **options):
    """A function of huggingface_hub, called again where what failed may pass; OSError, with the
    mend, where it does not. The library sees to the cache (HF_HOME), HF_TOKEN and HF_ENDPOINT."""
    import huggingface_hub as hub
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2 ** attempt)
        try:
            result = getattr(hub, function)(repo, *args, **options)
            # A listing is a generator, which asks when it is read
            return list(result) if function == "list_repo_tree" else result
        except ValueError:  # no name of a repository
            raise
        except Exception as e:  # the library's are OSErrors, but not those of its transport
            error, cause, status = e, e, None
            # Options are given for datasets alone
            page = f"{hub.constants.ENDPOINT}/{'datasets/' if options else ''}{repo}"
        while cause and not status:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            cause = cause.__cause__
        if status in (401, 403, 404):
            raise FileNotFoundError(
                f"status {status}: not there, or gated: see {page}, accept its terms there, and "
                "set HF_TOKEN to a token of that account")
    raise ConnectionError(f"{page}: {error!r}; the same command goes on from here")


def download_dataset(name, count=None):
    """The local paths of the first `count` files of a dataset of HUB. Its listing is kept, so that
    all runs and ranks see the same, and a complete copy needs no network. Each rank begins with its
    share; the library's locks make it wait for what another one is downloading."""
    from huggingface_hub.constants import HF_HUB_CACHE
    (repo, prefix), options = HUB[name], {"repo_type": "dataset"}
    listing = DATA / "hub" / f"{name}.json"
    if RANK == 0 and not listing.is_file():
        commit = ask_hub("repo_info", repo, **options).sha
        tree = ask_hub("list_repo_tree", repo, os.path.dirname(prefix), revision=commit, **options)
        files = {file.path: file.size for file in tree
                 if file.path.startswith(prefix) and file.path.endswith(KINDS)}
        write_whole(listing, json.dumps([commit, files]).encode())
    wait_for(listing.is_file)
    options["revision"], files = config.read_json(listing)
    paths = sorted(files)[:count]
    missing = sum(files[path] for path in paths
                  if not ask_hub("try_to_load_from_cache", repo, path, **options))
    check_disk_space(Path(HF_HUB_CACHE), f"downloads of {repo}", missing)
    for path in paths[RANK::WORLD]:
        ask_hub("hf_hub_download", repo, path, **options)
    return [ask_hub("hf_hub_download", repo, path, **options) for path in paths]


def wait_for(ready):
    """Return when ready(), which rank 0 or others see to, is true."""
    if not ready():
        print("  waiting for other ranks")
    while not ready():
        time.sleep(1)


def check_disk_space(folder, what, wanted):
    """Make the folder, say how many bytes are about to be written there, and die if its disk has
    not so many."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        die(f"{what}: needs about {wanted / 1e9:,.2f} GB, and {folder} has {free / 1e9:,.2f} GB "
            "free: make room, or put a link to a larger disk there")
    if wanted:
        print(f"  {what}: about {wanted / 1e9:,.2f} GB, {free / 1e9:,.2f} GB free")


# -- Corpora to documents -------------------------------------------------------------------------

SHARD_BYTES = 16 << 20  # of text that one worker tokenizes at a time, and a killed run does again
KINDS = (".py", ".txt", ".jsonl", ".jsonl.gz", ".parquet")


def corpus_files(corpus):
    """The files of "stdlib", of a dataset of HUB, of a folder, or the one file."""
    name, _, count = corpus.partition(":")
    root = Path(corpus)
    if corpus == "stdlib":
        return _demo_problems.stdlib_files()
    if name in HUB and not root.exists():
        if count and not count.isdecimal():
            die(f"corpora: {corpus}: {count!r} is no number of files")
        files = download_dataset(name, int(count) if count else None)
    else:
        files = sorted(path for path in (root, *root.rglob("*"))
                       if path.is_file() and (path == root or path.name.endswith(KINDS)))
    if not files:
        die(f"corpora: {corpus} is neither stdlib, fineweb, the-stack, nor a file, nor a folder "
            f"with {' '.join(KINDS)}")
    return files


def split_file(path):
    """[(path, begin, end, about how many bytes of text)]: what of a file can be read on its own:
    row groups of Parquet, ranges of bytes of a JSONL (a row is of the one that it begins in), else
    all of it."""
    name, size = str(path), os.path.getsize(path)
    if name.endswith(".parquet"):
        try:
            meta = config.open_parquet(name).metadata
            return [(name, i, i + 1, meta.row_group(i).total_byte_size)
                    for i in range(meta.num_row_groups)]
        except (OSError, ValueError):
            pass  # read_span says what is wrong
    step = SHARD_BYTES if name.endswith(".jsonl") else 1 << 60
    return [(name, at, at + step, min(step, size - at)) for at in range(0, size + 1, step)]


def read_span(name, begin, end):
    """Yield (name of a document, its text, or the ValueError that says why there is none)."""
    rows = read_lines, row_text
    read, parse = {".parquet": (read_parquet, bytes.decode), ".jsonl": rows, ".gz": rows}.get(
        Path(name).suffix, (read_text, str))
    try:
        for where, raw in read(name, begin, end):
            try:
                yield f"{name}{where}", parse(raw) or ValueError("no text")
            except UnicodeError:
                yield f"{name}{where}", ValueError("not UTF-8")
            except ValueError as e:
                yield f"{name}{where}", e
    except Exception as e:  # there is hardly one that a damaged file does not make pyarrow raise
        yield name, ValueError(f"unreadable{Path(name).suffix}: {e!r}")


def read_parquet(name, begin, end):
    import pyarrow
    file = config.open_parquet(name)
    names = file.schema_arrow.names
    column = next((name for name in ("text", "content") if name in names), None)
    if not column:
        raise ValueError("no column text or content")
    for batch in file.iter_batches(16, row_groups=[begin], columns=[column]):  # 16 rows at a time
        for text in batch.column(0).cast(pyarrow.large_binary()):
            yield f", row group {begin}", text.as_py() or b""


def read_lines(name, begin, end):
    with config.open_lines(name) as f:
        if begin:  # the row that this range begins in is the one before's, unless it begins here
            f.seek(begin - 1)
            f.readline()
        while (at := f.tell()) < end and (line := f.readline()):
            if line.strip():
                yield f", byte {at}", line


def row_text(line):
    row = config.parse_row(line)
    text = row.get("text", row.get("content"))
    return text if isinstance(text, str) else ""


def read_text(name, begin, end):
    with open(name, encoding="utf-8-sig") as f:
        yield "", f.read(SHARD_BYTES // 2) + f.readline(SHARD_BYTES // 2)
        while text := f.read(SHARD_BYTES // 2):  # a long text becomes several documents
            yield "", text + f.readline(SHARD_BYTES // 2)


def read_documents(corpus):
    """Yield (name, text) of a corpus, without what cannot be read."""
    for path in corpus_files(corpus):
        for *span, _ in split_file(path):
            yield from (row for row in read_span(*span) if isinstance(row[1], str))


def hash_text(text):
    """A number in [0, 1), by which a text is held out or not, whatever stands around it."""
    return int(digest(text), 16) / 2 ** 64


# -- Documents to bins ----------------------------------------------------------------------------

def plan_shards(corpora):
    """[[bytes of text, [[path, begin, end], …]], …], each of about SHARD_BYTES."""
    shards = [[0, []]]
    for corpus in corpora:
        for path in corpus_files(corpus):
            for *span, size in split_file(path):
                if shards[-1][0] and shards[-1][0] + size > SHARD_BYTES:
                    shards.append([0, []])
                shards[-1][0] += size
                shards[-1][1].append(span)
    return shards


def set_worker_tokenizer(tokenizer):
    """What each worker does first."""
    global _enc
    _enc = get_tokenizer(tokenizer)


def tokenize_shard(report, spans, val_fraction):
    """Write the tokens of some spans' documents, each followed by end-of-text, into two files; then
    the file `report`: their names, how many documents they hold, what was skipped."""
    if report.is_file():
        return
    names, counts, skipped = [f"{report}.{os.getpid()}.{split}" for split in SPLITS], [0, 0], []
    files = [open(name, "wb") for name in names]
    for name, text in (document for span in spans for document in read_span(*span)):
        if isinstance(text, ValueError):
            skipped.append([name, str(text)])
            continue
        held_out = hash_text(text) < val_fraction
        for part in PARTS.findall(text):
            # not numpy's tofile, which passes over what a full disk did not take
            array("H", _enc.encode_ordinary(part)).tofile(files[held_out])
        array("H", [_enc.eot_token]).tofile(files[held_out])
        counts[held_out] += 1
    for file in files:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    write_whole(report, json.dumps([names, counts, skipped]).encode())


def write_bins(folder, enc, cfg):
    """Tokenize cfg.corpora into folder/{train,val}.bin, shard by shard, in a folder of this plan's
    own until all are done: shard i is rank i % WORLD's, and the bins are the shards in their order,
    whoever made them, and however often the run was killed."""
    sizes, shards = zip(*plan_shards(cfg.corpora))
    plan = json.dumps([fingerprint(enc), cfg.val_fraction, sizes, shards] + [
        # of several machines each may have a copy of its own, with other times
        os.path.getmtime(path) for spans in shards for path, *_ in spans if WORLD == 1])
    shards_folder = folder / f"shards-{digest(plan)}"
    reports = [shards_folder / f"{i:06}.json" for i in range(len(shards))]
    # shards and bins are two copies for a while, each of two bytes for three or four of text
    check_disk_space(shards_folder, f"tokens, {len(shards)} shards",
                     sum(size for size, path in zip(sizes, reports) if not path.is_file()))
    with config.start_pool(cfg.workers, set_worker_tokenizer, cfg.tokenizer) as pool:
        my_shards = slice(RANK, None, WORLD)
        jobs = pool.map(tokenize_shard, reports[my_shards], shards[my_shards],
                        [cfg.val_fraction] * len(shards))
        for _ in tqdm(jobs, "tokenizing", len(reports[my_shards])):
            pass
    if RANK == 0:
        wait_for(lambda: all(path.is_file() for path in reports))
        join_shards(folder, enc, cfg, [*map(config.read_json, reports)])


def join_shards(folder, enc, cfg, shards):
    """Lay the shards' tokens end to end in folder/{train,val}.bin. Where there are too few
    documents to hold out one, the end of the tokens is held out."""
    names, counts, skipped = zip(*shards)
    counts, bin_paths = [*map(sum, zip(*counts))], [folder / f"{split}.bin" for split in SPLITS]
    for bin_path, parts in zip(bin_paths, zip(*names)):
        with open(bin_path, "wb") as out:
            for part in parts:
                with open(part, "rb") as tokens:
                    shutil.copyfileobj(tokens, out)
    if cfg.val_fraction and (sum(counts) * cfg.val_fraction < 1 or 0 in counts):
        tokens = np.concatenate([np.fromfile(path, "<u2") for path in bin_paths])
        n = max(1, int(len(tokens) * cfg.val_fraction), min(len(tokens) // 10, 4096))
        print(f"  {sum(counts)} documents are too few to hold out one: the last {n:,} tokens are "
              "held out")
        counts = [sum(counts), 0]
        for bin_path, part in zip(bin_paths, np.split(tokens, [-n])):
            bin_path.write_bytes(part)
    write_meta(folder, enc, cfg, cfg.corpora, "documents", counts, sum(skipped, []))


def write_meta(folder, enc, cfg, sources, what, counts, skipped):
    """Write folder/meta.json, which says that the data is complete: the tokenizer, tokens and
    documents (or examples) of both splits, sources, what was skipped."""
    meta = {"form": cfg.form or "text", "tokenizer": cfg.tokenizer, "fingerprint": fingerprint(enc),
            "vocab_size": enc.n_vocab, "sources": sources,
            "skipped": write_skipped(folder / "skipped.jsonl", skipped)}
    for split, count in zip(SPLITS, counts):
        tokens = os.path.getsize(folder / f"{split}.bin") // 2
        meta[split] = {"tokens": tokens, what: count}
        print(f"  {split}: {tokens:,} tokens, {count:,} {what}")
    os.sync()
    if meta["train"]["tokens"]:
        write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())


def write_skipped(path, skipped):
    """List [where, reason]s in a JSONL; say and return how many there are of each reason."""
    write_jsonl(path, skipped)
    counts = Counter(reason.partition(":")[0] for _, reason in skipped)
    for reason, n in counts.items():
        print(f"  skipped {n:,}: {reason}")
    return counts


# -- Instruction pairs ----------------------------------------------------------------------------

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)


def extract_code(text):
    """The Python of an answer in Markdown: the contents of its python fences (of the bare ones, if
    there are none), joined; a text without fences if it is Python; else ""."""
    blocks = FENCE.findall(text)
    codes = ([code for language, code in blocks if re.fullmatch("python3?|py", language, re.I)]
             or [code for language, code in blocks if not language])
    if not blocks:
        try:
            ast.parse(text)
            codes = [text]
        except Exception:  # no Python, or too deep for the parser
            pass
    code = "\n".join(textwrap.dedent(code).strip("\n") for code in codes)
    return code + "\n" if code.strip() else ""


# Of a form, or of a name in --instruct as it is typed: the columns, where they have other names
# than instruction and response.
FIELDS = {"edits": ("source_instruction", "edit_path"), "magicoder": ("problem", "solution")}


def clean_hub_pair(row, instruction, response):
    """The pair of Magicoder's or StarCoder2's row: Python only, without its Markdown."""
    if row.get("lang", "python") != "python":
        raise ValueError("of another language")
    if not (code := extract_code(response)):
        raise ValueError("without code")
    return instruction.strip(), code


def instruct_rows(name, cfg):
    """(number, row) of one of cfg.instruct, for config.read_pair."""
    if name == "stdlib":
        return enumerate(_demo_problems.stdlib_pairs())
    if name == "family":
        return enumerate(_demo_problems.family_pairs(cfg))
    paths = download_dataset(name) if name in HUB else [name]
    return (row for path in paths for row in config.read_rows(path))


def split_words(text):
    return re.findall(r"[a-z]+", text.lower())


def contamination_test():
    """A test for a text: does it hold ten words in a row of a HumanEval or MBPP problem's text (all
    of them, where it has six to nine), or all the words of its solution (ten or more)? A word is a
    run of letters, in lower case."""
    known = {}  # the first six words: sequences that begin so
    for name, text, solution in (("humaneval", "prompt", "canonical_solution"),
                                 ("mbpp", "text", "code")):
        for _, row in instruct_rows(name, None):
            problem, code = map(split_words, config.read_pair(row, text, solution))
            n = max(6, min(10, len(problem)))
            runs = [problem[i:i + n] for i in range(len(problem) - n + 1)]
            for run in runs + [code] * (len(code) >= 10):
                known.setdefault(tuple(run[:6]), set()).add(" ".join(run))

    def is_contaminated(text):
        words = split_words(text)
        whole = f" {' '.join(words)} "
        return any(f" {run} " in whole for i in range(len(words))
                   for run in known.get(tuple(words[i:i + 6]), ()))
    return is_contaminated


def near_duplicate_test():
    """A test for a text: does it share 70% of its runs of five words with one before it (The
    Stack's measure)? Looked at are those that share one of the 16 runs whose hashes are smallest
    (MinHash). Of the texts that share one such run only the first 50 are looked at: a phrase that
    very many have would cost time and tells nothing."""
    kept, texts_with_run = [], {}  # each kept text's runs; {run: numbers of kept texts}

    def is_near_duplicate(text):
        words = split_words(text)
        runs = {zlib.crc32(" ".join(words[i:i + 5]).encode())
                for i in range(max(1, len(words) - 4))}
        smallest = [texts_with_run.setdefault(run, []) for run in sorted(runs)[:16]]
        for other in set().union(*smallest):
            shared = len(runs.intersection(kept[other]))
            if shared >= 0.7 * (len(runs) + len(kept[other]) - shared):
                return True
        for texts in smallest:
            if len(texts) < 50:
                texts.append(len(kept))
        kept.append(array("I", runs))
        return False
    return is_near_duplicate


def write_instruct(cfg):
    """Write cfg.source (pairs) and, with the family, cfg.benchmark (its held-out problems).
    Repeated responses are left out, of the hub's data near duplicates and what the benchmarks hold,
    too."""
    pairs, skipped, filters = {}, [], {}
    for name in cfg.instruct:
        if name in HUB and not filters:
            filters = {"with text of HumanEval or MBPP": contamination_test(),
                       "near duplicate": near_duplicate_test()}
        for n, row in tqdm(instruct_rows(name, cfg), name):
            try:
                instruction, response = config.read_pair(row, *FIELDS.get(name, ()))
                if name in HUB:
                    instruction, response = clean_hub_pair(row, instruction, response)
                if response in pairs:
                    raise ValueError("repeated response")
                for reason, is_unwanted in filters.items():
                    if name in HUB and is_unwanted(f"{instruction}\n{response}"):
                        raise ValueError(reason)
                pairs[response] = {"instruction": instruction, "response": response}
            except ValueError as e:
                skipped.append([f"{name}:{n}", str(e)])
    print(f"  {len(pairs):,} pairs -> {cfg.source}")
    pairs = [*pairs.values()]
    random.Random(cfg.seed).shuffle(pairs)
    write_skipped(f"{cfg.source}.skipped.jsonl", skipped)
    if not pairs:
        die(f"no pair in instruct={','.join(cfg.instruct)}: {cfg.source}.skipped.jsonl says why")
    write_jsonl(cfg.source, pairs)


# -- Examples to bins -----------------------------------------------------------------------------

def check_finished(path):
    """Die if lintseq.py, or one of its ranks, has not come to the end of the edits at `path`: their
    state files say so. Files that came from elsewhere have none, nor has a rank that never
    began."""
    for state in glob.glob(glob.escape(path) + "*.state.json"):
        if not Path(state).read_text().endswith("true]"):
            die(f"{path} is not whole: {state} says that lintseq.py has not come to its end; the "
                "same command goes on from there")


def write_examples(folder, enc, cfg, path):
    """Tokenize the examples in a file, of the form cfg.form, into folder/{train,val}.bin and
    .examples.npy."""
    splits, skipped = [(array("H"), []) for _ in SPLITS], []  # tokens, where each example begins
    for n, row in tqdm(config.read_rows(path), "tokenizing"):
        try:
            instruction, answer = config.read_pair(row, *FIELDS.get(cfg.form, ()))
            prompt, response = encode_example(enc, cfg.form, instruction, answer)
            if len(prompt + response) > cfg.max_tokens:
                raise ValueError(f"longer than {cfg.max_tokens} tokens")
            tokens, starts = splits[hash_text(instruction) < cfg.val_fraction]
            starts.append((len(tokens), len(tokens) + len(prompt)))
            tokens.extend(prompt + response)
        except ValueError as e:
            skipped.append([f"{path}:{n}", str(e)])
    for split, (tokens, starts) in zip(SPLITS, splits):
        (folder / f"{split}.bin").write_bytes(tokens)
        table = io.BytesIO()  # to a file np.save writes by tofile
        np.save(table, np.array(starts, np.int64).reshape(-1, 2))
        (folder / f"{split}.examples.npy").write_bytes(table.getbuffer())
    write_meta(folder, enc, cfg, [path], "examples", [len(starts) for _, starts in splits], skipped)


# -- Export ---------------------------------------------------------------------------------------

def tokenizer_json(enc):
    """The text of a tokenizer.json that gives `enc`'s ids, for Hugging Face's libraries."""
    if isinstance(enc, PublishedTokenizer):
        return enc.bpe.to_str()
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {"".join(map(LETTERS.__getitem__, token)): i
             for token, i in enc._mergeable_ranks.items()}
    merges = [(token[:i], token[i:]) for token in sorted(vocab, key=vocab.get)
              for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    library = Tokenizer(models.BPE(vocab | enc._special_tokens, merges, ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(enc._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(enc._special_tokens))
    return library.to_str()


def export(cfg):
    """A checkpoint as a folder that Hugging Face's libraries load: weights, config, tokenizer and a
    model card."""
    from model import GPT, one_line
    try:
        model = GPT.from_pretrained(cfg.export)
        info, enc = model.info, load_tokenizer(model.info)
    except Exception as e:
        die(f"--export={cfg.export}: its ckpt.pt, or the tokenizer in that, cannot be read: "
            f"{one_line(e)}")
    folder = Path(cfg.export) / "hf"
    model.save_pretrained(folder, eos_token_id=enc.eot_token, form=info["form"])
    write_whole(folder / "tokenizer.json", tokenizer_json(enc).encode())
    write_whole(folder / "tokenizer_config.json", json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
         "eos_token": EOT, "model_max_length": model.config.block_size}).encode())
    write_whole(folder / "README.md", model_card(cfg, model).encode())
    print(f"prepare.py: {folder}: {model.num_params():,} parameters, step {info['step']:,}")


def model_card(cfg, model):
    """The model's README.md: what it reads and writes, a warning, its scores, its configuration."""
    name, scores = Path(cfg.export).name, []
    for path in sorted(Path(cfg.results).rglob("results.json")):  # a folder a benchmark
        try:
            results = json.loads(path.read_text())
            scores += [f"- {Path(run['benchmark']).stem}, {len(run['correct'])} problems, "
                       f"temperature {run['temperature']}: pass@{k} {100 * score['mean']:.1f} ± "
                       f"{100 * score['standard_error']:.1f}"
                       for run in results["runs"] if Path(run["model"]).name == name
                       for k, score in run["pass@k"].items()]
        except Exception:
            print(f"prepare.py: {path} is not what evaluate.py writes: no scores from there")
    scores = "\n".join(scores or ["None measured yet."])
    reads = {"edits": f"an instruction, a new line and `{DIFF}`, and writes a sequence of edits "
                      "(diffs) that put the program together",
             "programs": "an instruction and a new line, and writes a program",
             "text": "text and code, and continues it"}[model.info["form"] or "text"]
    settings = (model.info["settings"] or {}) | vars(model.config)
    settings = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [code, lintseq]
---
# {name}

A TinyCodeLM (LintSeq, arXiv 2410.02749) of {model.num_params():,} parameters after
{model.info['step']:,} steps, architecture `OlmoForCausalLM`. It reads {reads}.

**Programs written by a model must not be run without precautions**: they can be wrong or harmful.
Read them, and run them in a sandbox without rights, files or network. A model this small makes
mistakes in most of what it writes.

## Scores (in %, with a standard error over the problems)

{scores}

## The run's configuration

```python
{settings}
```
"""


# -- The command ----------------------------------------------------------------------------------

def main():
    cfg = config.load(Settings)
    if cfg.export:
        return export(cfg)
    if not (cfg.corpora or cfg.form or cfg.instruct) or cfg.instruct and not cfg.source:
        die("nothing to prepare: give a config file, as in python prepare.py config/demo.py, or "
            "--corpora=… (files of text), or --instruct=… with --source=…; --help lists all", 2)
    folder = DATA / cfg.dataset
    lock = config.lock_file(folder / f".lock{RANK}")  # noqa: F841  held to the end
    written = [cfg.source] + [cfg.benchmark] * ("family" in cfg.instruct)
    if cfg.instruct and all(map(os.path.isfile, written)):
        say(f"{cfg.source} is there already; delete it to make it anew")
    elif cfg.instruct and RANK == 0:
        write_instruct(cfg)
    meta_path = folder / "meta.json"
    if meta_path.is_file():
        say(f"{folder} is there already, as meta.json says, whatever the settings are now; delete "
            "it to make it anew")
    elif cfg.form and RANK == 0:
        path = cfg.dest if cfg.form == "edits" else cfg.source
        if not Path(path).is_file():
            die(f"next {path!r} is needed: lintseq.py makes edits (dest; cat joins what its ranks "
                "wrote), instruct=… makes pairs (source)")
        check_finished(path)
        write_examples(folder, make_tokenizer(cfg), cfg, path)
    elif cfg.corpora and not cfg.form:
        write_bins(folder, make_tokenizer(cfg), cfg)
    if RANK == 0 and (cfg.corpora or cfg.form):
        for old in folder.glob("shards-*"):
            shutil.rmtree(old)
        if not meta_path.is_file():
            die(f"nothing to train on: {folder}/skipped.jsonl lists what was skipped")


if __name__ == "__main__":
    config.run(main)
