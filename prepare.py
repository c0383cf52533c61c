"""Text to tokens: tokenizers, corpora, instruction data, and the memmapped bins that train.py reads.

    python prepare.py config/demo.py             # the demo: a tokenizer, the standard library, small problems
    python prepare.py config/demo_edits.py       # after lintseq.py: edit sequences (form = "edits") into a bin
    python prepare.py config/demo_programs.py    # whole programs (form = "programs"), the paper's baseline

Writes data/<dataset>/{train,val}.bin, raw little-endian uint16 tokens without a header, and meta.json: tokenizer,
counts, sources, what was skipped and why. Instruction data adds {train,val}.examples.npy, int64 (n, 2): where each
example and where its response starts. What is there already is not made again; every file appears whole or not at all.
"""
import ast
import base64
import hashlib
import json
import os
import random
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import config
import lintseq

DATA = Path("data")
EOT, DIFF = "<|endoftext|>", lintseq.DIFF


class Settings:
    dataset = "demo"  # the folder under data/ that is written
    tokenizer = "p50k_base"  # a tiktoken encoding, or a .tiktoken file (trained here if it is missing)
    bpe_size = 1024  # entries of a tokenizer that is trained here
    corpora = ()  # pretraining text: "stdlib", or files and folders (.py .txt .jsonl)
    instruct = ()  # instruction data: "stdlib", "family", or .jsonl files of `instruction`, `response`
    source = ""  # the JSONL of instruction and response that `instruct` becomes; lintseq.py reads it
    dest = ""  # the JSONL of edit sequences that lintseq.py writes
    form = ""  # tokenize instruction data: "edits" (dest) or "programs" (source)
    benchmark = ""  # where the family's held-out problems go; evaluate.py scores them
    family_size = 12_000  # problems of the procedural family to train on
    family_heldout = 200  # and held out
    val_fraction = 0.01  # of the documents or examples, chosen by a hash of their text
    max_tokens = 1024  # longest example of instruction data, tokens; longer ones are left out and counted
    seed = 1337  # of the family and of the order of examples


def die(message):
    print(f"prepare.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def write_whole(path, data):
    """Write bytes to a temporary file beside `path`, flush, rename: a crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


# -- Tokenizers -------------------------------------------------------------------------------------------------------

# GPT-4's pattern with two changes for small models: a number is cut into one or two digits, and what stands between
# the numbers of a hunk's header, and a new line's "+" with its indentation, are pieces of their own.
PATTERN = "|".join([
    r"@@ -", r",0 \+", r" @@\r?\n\+ *(?= |\S)", r"\n\+ *(?= |\S)",
    r"'(?:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,2}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"])


def get_tokenizer(name):
    """tiktoken.Encoding with the special tokens <|endoftext|> and <|diff|>, from the name of one of tiktoken's own
    encodings (fetched by tiktoken on first use) or a .tiktoken file: a line per token, base64 and rank.
    FileNotFoundError or ValueError if there is none such."""
    if name.endswith(".tiktoken"):
        lines = Path(name).read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks), DIFF: len(ranks) + 1})
    base = tiktoken.get_encoding(name)
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


# -- Corpora ----------------------------------------------------------------------------------------------------------

def documents(corpus):
    """Yield (name, text) of a corpus: "stdlib" (this Python's own library, without its tests), a file or a folder."""
    if corpus == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3"}
        paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    else:
        root = Path(corpus)
        if not root.exists():
            die(f"corpora: no file or folder {corpus}")
        paths = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txt", ".jsonl")) if root.is_dir() else [root]
    for path in paths:
        if path.suffix == ".jsonl":
            for n, line in enumerate(path.open(encoding="utf-8", errors="replace"), 1):
                try:
                    yield f"{path}:{n}", json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    yield f"{path}:{n}", None
        else:
            try:
                yield str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                yield str(path), None


def held_out(text, fraction):
    """Whether a text belongs to the validation set, by its hash alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2 ** 64


def write_bins(folder, docs, enc, cfg):
    """Tokenize (name, text) documents into folder/{train,val}.bin, each document followed by end-of-text."""
    meta = {"form": "text", **tokenizer_meta(cfg.tokenizer, enc), "sources": list(cfg.corpora), "skipped": Counter()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: open(folder / f"{split}.bin.tmp", "wb") for split in ("train", "val")}
    counts = {split: Counter() for split in files}
    for name, text in tqdm(docs, desc="tokenizing", unit="doc", mininterval=1):
        if not text:
            meta["skipped"]["empty" if text == "" else "not UTF-8 or a broken row"] += 1
            continue
        split = "val" if held_out(text, cfg.val_fraction) else "train"
        tokens = np.array(enc.encode_ordinary(text) + [enc.eot_token], dtype="<u2")
        tokens.tofile(files[split])
        counts[split].update(tokens=len(tokens), documents=1)
    for split, f in files.items():
        f.flush()
        os.fsync(f.fileno())
        f.close()
        os.replace(f.name, folder / f"{split}.bin")
        meta[split] = dict(counts[split])
    write_whole(folder / "meta.json", json.dumps(meta, indent=2).encode())
    return meta


def tokenizer_meta(name, enc):
    return {"tokenizer": name, "fingerprint": fingerprint(enc), "vocab_size": enc.n_vocab}


# -- Instruction data -------------------------------------------------------------------------------------------------

def stdlib_pairs():
    """Yield {instruction, response} from the standard library: each module-level function that has a docstring and
    needs nothing beyond builtins, as «docstring to function», without its docstring."""
    seen = set()
    for _, text in documents("stdlib"):
        try:
            tree = ast.parse(text or "")
        except (SyntaxError, ValueError):
            continue
        lines = (text or "").splitlines()
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list or len(node.body) < 2:
                continue
            doc = ast.get_docstring(node)
            if not doc or not doc.isascii():
                continue
            first, last = node.body[0], node.body[-1]
            signature = lines[node.lineno - 1:first.lineno - 1]
            code = "\n".join(signature + lines[first.end_lineno:last.end_lineno]) + "\n"
            summary = " ".join(doc.split("\n\n")[0].split())
            key = ast.dump(ast.Module(node.body[1:], []))
            if key in seen or len(summary) < 20 or "<|" in doc:
                continue
            try:
                clean = not lintseq.lint(code)
            except SyntaxError:
                clean = False
            if clean:
                seen.add(key)
                yield {"instruction": f"Write a Python function `{node.name}({ast.unparse(node.args)})`: {summary}",
                       "response": code}


# The procedural family: filter x map x reduce x finish over a list of integers, each an English phrase and some lines
# of Python. It cannot be solved by copying: the instruction holds no code, and a composition (which filter, map,
# reduction and finish, whatever their constants) that is held out never stands in the training data, so that its
# program is nowhere to be found; only the constants and names are copied, and to the places where they belong.
# {k} is a constant, {a} the argument, {x} an item.
HELPERS = {
    "is_prime": "def is_prime(n):\n    if n < 2:\n        return False\n    for d in range(2, n):\n"
                "        if n % d == 0:\n            return False\n    return True\n",
    "digit_sum": "def digit_sum(n):\n    total = 0\n    for digit in str(abs(n)):\n        total += int(digit)\n"
                 "    return total\n",
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
    "plus": ((", plus {k}", ", increased by {k}"), ["{r} += {k}"], "{r}", "int"),
    "times": ((", times {k}", ", multiplied by {k}"), ["{r} *= {k}"], "{r}", "int"),
    "modulo": ((", modulo {k}", ", reduced modulo {k}"), ["{r} %= {k}"], "{r}", "int"),
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


def family_problem(composition, rng):
    """{instruction, response, entry_point, test} of one composition: names, constants and phrases drawn by `rng`, the
    assertions computed by running the program."""
    (f, m, r, e), name, a, x = composition, rng.choice(NAMES), rng.choice(ARGUMENTS), "x"
    phrases, body = [], []
    pick = lambda text, k: text.format(a=a, x=x, y="y", k=k, r=REDUCES[r][3])
    kf, km, kr, ke = *(rng.randint(2, 20) for _ in range(3)), rng.randint(2, 4 if e == "first" else 20)  # "first 20" would never bite
    phrases = [pick(rng.choice(table[key][0]), k) for table, key, k in
               ((FILTERS, f, kf), (MAPS, m, km), (REDUCES, r, kr), (FINISHES, e, ke))]
    body += [pick(line, kr) for line in REDUCES[r][1]] + [f"for {x} in {a}:"]
    inner = [f"y = {pick(MAPS[m][1], km)}"] + [pick(line, kr) for line in REDUCES[r][2]]
    if FILTERS[f][1]:
        inner = [f"if {pick(FILTERS[f][1], kf)}:"] + ["    " + line for line in inner]
    body += ["    " + line for line in inner] + [pick(line, ke) for line in FINISHES[e][1]]
    body += [f"return {pick(FINISHES[e][2], ke)}"]
    program = f"def {name}({a}):\n" + "".join(f"    {line}\n" for line in body)
    program = "".join(code + "\n" for helper, code in HELPERS.items() if helper + "(" in program) + program
    space = {}
    exec(program, space)  # ours, not a model's
    tests = [[]] + [[rng.randint(-12, 30) for _ in range(rng.randint(3, 9))] for _ in range(7)]
    return {"instruction": f"Write a Python function `{name}({a})` that {phrases[0]}, {phrases[1]} and {phrases[2]}"
                           f"{phrases[3]}.",
            "response": program, "entry_point": name,
            "test": "".join(f"assert {name}({t}) == {space[name](list(t))!r}\n" for t in tests)}


def family(cfg):
    """(training pairs, held-out problems). The compositions are shuffled by the seed and cut in two: what is held out
    shares no composition with training. Training takes them in turn until there are cfg.family_size pairs."""
    rng = random.Random(cfg.seed)
    compositions = family_compositions()
    rng.shuffle(compositions)
    test, train = compositions[:cfg.family_heldout], compositions[cfg.family_heldout:]
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


def make_instruct(cfg):
    """Write cfg.source (pairs) and, with the family, cfg.benchmark (its held-out problems)."""
    pairs, seen = [], set()
    for name in cfg.instruct:
        if name == "family":
            rows, problems = family(cfg)
            write_whole(Path(cfg.benchmark), jsonl(problems))
        else:
            rows = list(stdlib_pairs() if name == "stdlib" else read_pairs(name))
        new = [r for r in rows if r["response"] not in seen]
        seen.update(r["response"] for r in new)
        print(f"  {name}: {len(new):,} pairs, {len(rows) - len(new):,} repeats left out")
        pairs += new
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
                yield row["source_instruction"], lintseq.training_text(row["source_instruction"], row["edit_path"])
            else:
                prompt, program = row["instruction"], row["response"]
                gap = "" if prompt[-1:].isspace() or program[:1].isspace() else "\n"
                yield prompt, (prompt + gap, program + EOT)
        except (ValueError, KeyError, TypeError) as e:
            die(f"{path}, row {n}: {type(e).__name__}: {e}")


def write_examples(folder, enc, cfg):
    """Tokenize instruction data in the form cfg.form into folder/{train,val}.bin and .examples.npy."""
    tokens, starts, skipped = {"train": [], "val": []}, {"train": [], "val": []}, Counter()
    specials = {EOT, DIFF}
    for instruction, (prompt, response) in tqdm(examples(cfg), desc="tokenizing", unit="example", mininterval=1):
        split = "val" if held_out(instruction, cfg.val_fraction) else "train"
        head = enc.encode(prompt, allowed_special=specials, disallowed_special=())
        tail = enc.encode(response, allowed_special=specials, disallowed_special=())
        if len(head) + len(tail) > cfg.max_tokens:
            skipped[f"longer than {cfg.max_tokens} tokens"] += 1
            continue
        starts[split].append((len(tokens[split]), len(tokens[split]) + len(head)))
        tokens[split] += head + tail
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


def main():
    cfg = config.load(Settings)
    start, folder = time.time(), DATA / cfg.dataset
    if cfg.instruct and not Path(cfg.source).is_file():
        print(f"instruction data -> {cfg.source}")
        make_instruct(cfg)
    if not (cfg.corpora or cfg.form):
        return
    if (folder / "meta.json").is_file():
        print(f"{folder} is there already; delete it to make it anew")
        return
    if cfg.tokenizer.endswith(".tiktoken") and not Path(cfg.tokenizer).is_file():
        print(f"tokenizer -> {cfg.tokenizer}: a BPE of {cfg.bpe_size} entries")
        train_tokenizer(cfg.tokenizer, tokenizer_texts(cfg), cfg.bpe_size)
    enc = get_tokenizer(cfg.tokenizer)
    print(f"tokens -> {folder}")
    meta = write_examples(folder, enc, cfg) if cfg.form else write_bins(
        folder, (d for c in cfg.corpora for d in documents(c)), enc, cfg)
    for split in ("train", "val"):
        print(f"  {split}: " + ", ".join(f"{n:,} {what}" for what, n in meta[split].items()))
    for reason, n in meta["skipped"].items():
        print(f"  skipped {n:,}: {reason}")
    print(f"prepare.py: {time.time() - start:.1f} s")


def tokenizer_texts(cfg):
    """What a small tokenizer is trained on: some of everything that the model will read."""
    for corpus in cfg.corpora:
        for _, text in documents(corpus):
            if text and not held_out(text, cfg.val_fraction):
                yield text
    for i, row in enumerate(read_pairs(cfg.source) if cfg.source else ()):
        yield row["instruction"]
        try:
            yield "\n".join(lintseq.lintseq(row["response"], random.Random(i)))
        except ValueError:
            pass


if __name__ == "__main__":
    main()
