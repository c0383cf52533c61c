"""A prompt to a program: the model writes edits, they are applied as they come, and the program grows on the screen.

    python sample.py                                            # the newest checkpoint, a sample instruction
    python sample.py --prompt="Write a function that ..." --num_samples=3 --out=file.py
    echo "Write a function that ..." | python sample.py --init_from=out-150m-edits

The program goes to standard output or --out, what the model wrote (the edits, in colour on a terminal) to standard
error. Nothing that a model writes is run here. Left out: chat, and prompts longer than the model's block_size.
"""
import json
import re
import sys
from pathlib import Path

import config
import lintseq
import prepare


class Settings:
    init_from = ""  # a folder with ckpt.pt, or a Hugging Face model; empty: out_dir, else the newest out*/ckpt.pt
    out_dir = ""  # where a config file's own training run wrote
    prompt = ""  # the instruction; empty: standard input, if something is piped in, else a held-out problem's
    benchmark = "data/demo-problems.jsonl"  # JSONL of problems, whose first instruction is the sample prompt
    out = ""  # write the program to this file (with --num_samples=3: file.py, file-1.py, file-2.py)
    num_samples = 1  # programs to write, with seeds seed, seed + 1, ...; at temperature 0 all are one
    max_new_tokens = 512  # at most, a sample
    temperature = 0.0  # 0 takes the likeliest token; the paper samples with 1 and top_p 0.95
    top_p = 0.95  # nucleus
    edit_retries = 2  # edits: how often one that leaves linter errors is drawn again
    seed = 1337  # of the first sample
    device = "auto"  # cuda if there is one, mps, else cpu
    dtype = "auto"  # bfloat16 on cuda, else float32


def die(message):
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def newest_checkpoint():
    """The folder of the out*/ckpt.pt that was written last, or one line that says how to get one."""
    found = sorted(Path(".").glob("out*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    return str(found[-1].parent) if found else die(
        "no checkpoint (out*/ckpt.pt) yet: `make demo` trains one in a quarter of an hour, "
        "or name a folder or a Hugging Face model with --init_from")


def load_model(init_from, device="auto", dtype="auto"):
    """(model in evaluation mode on the device, its tokenizer, info: form, step, tokenizer, ...).

    init_from: a folder with ckpt.pt (the tokenizer must be the one it was trained with) or a Hugging Face model, whose
    form is "form" in its config.json, else what its name says: edits for "LintSeq", programs for another "Instruct".
    SystemExit with one line if it cannot be had."""
    import torch
    from model import GPT
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    folder = Path(init_from)
    hub = not folder.exists() and init_from.count("/") == 1 and not init_from.startswith((".", "/"))
    if hub or (folder / "config.json").is_file() and not (folder / "ckpt.pt").is_file():
        try:
            folder = prepare.hub_model(init_from) if hub else folder
            model, enc = GPT.from_pretrained(folder), prepare.get_tokenizer(str(folder / "tokenizer.json"))
        except (OSError, ValueError) as e:
            die(f"{init_from}: {e}")
        name = Path(init_from).name.lower()
        form = "edits" if "lintseq" in name else "programs" if "instruct" in name else "text"
        info = {"form": json.loads((folder / "config.json").read_text()).get("form", form), "step": 0, "vocab_size": enc.n_vocab,
                "tokenizer": str(folder / "tokenizer.json"), "fingerprint": prepare.fingerprint(enc)}
        return model.to(device, getattr(torch, dtype)).eval(), enc, info
    try:
        checkpoint = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        die(f"{init_from} has no ckpt.pt: train one (python train.py config/demo.py) or name another with --init_from")
    except Exception as e:
        die(f"{folder / 'ckpt.pt'} cannot be read: {str(e).splitlines()[0]}; put best.pt in its place or train anew")
    info = {**checkpoint["meta"], "step": checkpoint["step"]}
    enc = tokenizer_of(info, init_from)
    return GPT.from_checkpoint(checkpoint).to(device, getattr(torch, dtype)).eval(), enc, info


def tokenizer_of(info, init_from):
    try:
        enc = prepare.get_tokenizer(info["tokenizer"])
    except (OSError, ValueError) as e:
        die(f"{init_from} needs the tokenizer {info['tokenizer']}: {e}")
    if prepare.fingerprint(enc) != info["fingerprint"]:
        die(f"{init_from} was trained with another {info['tokenizer']} (fingerprint {info['fingerprint']}, the file's is "
            f"{prepare.fingerprint(enc)}): put the old file back, or train again")
    return enc


def complete(model, enc, form, prompts, *, max_new_tokens, temperature, top_p, seeds, stop=(), edit_retries=0, batch_size=64, on_done=None, on_text=None):
    """One raw text a prompt: what the model wrote up to end-of-text, a string of `stop` or max_new_tokens.

    A prompt that leaves no room in block_size is answered with None. on_done(i, raw) is called as prompt i finishes,
    in any order; on_text(i, text) as its text comes, in pieces of whole characters. Edits are `constrained` and drawn
    again as Guide says."""
    ids = [prepare.encode_prompt(enc, form, p) for p in prompts]
    fits = [i for i, x in enumerate(ids) if 0 < len(x) < model.config.block_size]
    tokens, done = [[] for _ in prompts], [None] * len(prompts)

    def text_of(new):
        text = enc.decode(new, errors="replace")
        return text[:min((at for at in (text.find(s) for s in stop) if at >= 0), default=len(text))]

    def stopped(new):  # a stop string ends in the last token, so it begins in the last few
        tail = enc.decode(new[-24:], errors="replace")
        return any(s in tail for s in stop)

    def finish(i):
        done[i] = text_of(tokens[i]) if i in fits else None
        if on_done:
            on_done(i, done[i])

    def on_token(j, token):
        i = fits[j]
        if token is None:
            return finish(i)
        if token < 0:
            del tokens[i][token:]
            return
        tokens[i].append(token)
        if on_text and not enc.decode(tokens[i][-4:], errors="replace").endswith("\ufffd"):
            on_text(i, text_of(tokens[i]))

    for i in set(range(len(prompts))) - set(fits):
        finish(i)
    guides = [Guide(enc, edit_retries) for _ in fits] if edit_retries and form == "edits" else None
    model.generate([ids[i] for i in fits], max_new_tokens, temperature=temperature, top_p=top_p,
                   seeds=[seeds[i] for i in fits], stop_tokens=(enc.eot_token,), stop=stopped if stop else None,
                   accept=guides and (lambda j, new, token: guides[j](new, token)), batch_size=batch_size, on_token=on_token)
    return done


class Guide:
    """Constrained decoding of one sequence of edits, as model.generate's `accept`.

    A hunk's header `@@ -a,0 +c,n @@` must name a place that the program so far has, past the hunk before it, with the c
    that follows from it. Lines with "+" come next, then another hunk or a marker; two markers and end-of-text end it.
    Where a hunk turns out to have more or fewer lines than the n of its header, the header is put right and read again
    (making the model write n lines costs the demo 5 points of pass@1 at temperature 1: it is the lines that it means).
    Where an edit leaves a program with linter errors, it is drawn again, up to `retries` times."""

    def __init__(self, enc, retries=0):
        self.enc, self.retries, self.tries = enc, retries, 0
        self.now = ("edge", "", 0, 0, 0, 0), "", []  # advance's state, the edit's text, the program's lines before it
        self.begin = [], self.now  # where this edit begins: the tokens before it, and that
        self.hunk = 0, 0  # the token in which the last header begins, and where that token begins in the edit's text

    def __call__(self, new, token):
        state, text, lines = self.now
        if token == self.enc.eot_token:
            what, _, n, had, _, _ = state
            return None if what == "done" or what == "edge" and lines or what == "body" and n == had else False
        try:
            piece = self.enc.decode_single_token_bytes(token).decode("latin-1")  # a character a byte
        except KeyError:  # a row of the embedding that no token has
            return False
        hunk, start, keep, whole, wrong = self.hunk, len(text), None, False, None
        for c in piece:
            before, state, text = state, advance(state, c, len(lines)), text + c
            if state is None:
                return False
            if before[0] == "line" and c != "+" and before[2] != before[3]:
                wrong = before[3]  # the hunk is whole, and its header announced another number of lines
                text = put_right(text, hunk[1], wrong)
            if state[0] == "header" and before[0] != "header":
                hunk = len(new), start
            if state[0] == "edge":
                edit, text, lines, whole = text[:-len("\n" + lintseq.DIFF)], "", list(lines), True
                lintseq.apply_edit(lines, unicode(edit), {"hunks": 0, "malformed": 0})
        if wrong:
            first, at = self.hunk
            again = unicode(put_right(self.now[1], at, wrong)[at:] + piece)
            keep = new[:first] + self.enc.encode(again, allowed_special={lintseq.DIFF}, disallowed_special=())
            if state[0] == "header":
                hunk = len(keep) - 1, len(text) - len(piece)
        if whole:
            if self.tries < self.retries and broken(unicode("\n".join(lines))):
                self.tries += 1
                keep, self.now = self.begin
                return keep
            keep = keep or new + [token]
            self.tries, self.begin = 0, (keep, (state, text, lines))
        self.now, self.hunk = (state, text, lines), hunk
        return keep


def unicode(text):
    return text.encode("latin-1").decode("utf-8", "replace")


def put_right(text, at, n):
    """The edit's text with n lines announced by the first header at or after `at`."""
    return text[:at] + re.sub(r"(@@ -\d+,0 \+\d+)(,\d+)? @@", rf"\1{f',{n}' * (n > 1)} @@", text[at:], count=1)


def advance(state, c, size):
    """Guide's state after one more character, None where that cannot come; size: lines of the program so far.

    A state: what comes, the line so far, the lines that the hunk announces, those it has, the least a that the next
    hunk may name, lines that the edit has added."""
    what, line, n, had, low, added = state
    line += c
    if what == "body":  # in a line of a hunk: of what it holds only a marker matters
        return None if line.endswith(lintseq.DIFF) else ("line", "", n, had, low, added) if c == "\n" else (
            what, line[-8:], n, had, low, added)
    if what == "line":  # at the beginning of a line
        if c == "+":
            return ("body", "", n, had + 1, low, added)
        return ("header", line, 0, 0, low, added + had) if c == "@" and low <= size else (
            "marker", line, 0, 0, 0, 0) if c == "<" else None
    if what == "edge":  # after a marker
        return ("header", line, 0, 0, 0, 0) if c == "@" else ("end", "", 0, 0, 0, 0) if c == "\n" and size else None
    if what in ("marker", "end"):
        if line == lintseq.DIFF:
            return ("edge" if what == "marker" else "done", "", 0, 0, 0, 0)
        return (what, line, 0, 0, 0, 0) if lintseq.DIFF.startswith(line) else None
    if what == "done":
        return None
    found = re.match(r"@@ -(\d+)(.*)", line, re.DOTALL)  # in a header
    if not found:
        return (what, line, 0, 0, low, added) if "@@ -".startswith(line) else None
    a, rest = int(found[1]), found[2]
    place = f",0 +{a + 1 + added}"
    if not rest:  # does a number from low to size begin so?
        longer = range(len(str(size)) if a else 1)
        if found[1] != str(a) or not any(a * 10 ** k <= size and (a + 1) * 10 ** k > low for k in longer):
            return None
    elif not rest.startswith(place):
        if not (low <= a <= size and place.startswith(rest)):
            return None
    elif rest != place + ",":
        number = re.match(r",([1-9]\d{0,3})", rest[len(place):])
        tail = rest[len(place) + (number.end() if number else 0):]
        lines = int(number[1]) if number else 1
        if not " @@\n+".startswith(tail) or tail and number and lines == 1:
            return None
        if tail == " @@\n+":
            return ("body", "", lines, 1, a + 1, added)
    return (what, line, 0, 0, low, added)


def broken(source):
    try:
        return bool(lintseq.lint(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True


def read_program(form, prompt, raw):
    """(the program, a report) of what the model wrote: edits applied, a whole program as it is, or a prompt and its
    continuation. The report counts hunks: edits, hunks, malformed (zero for programs)."""
    if form == "edits":
        return lintseq.apply_and_count(raw)
    return (prompt + raw if form == "text" else raw), {"edits": 0, "hunks": 0, "malformed": 0}


def main():
    cfg = config.load(Settings)
    prompt = cfg.prompt
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    model, enc, info = load_model(cfg.init_from or cfg.out_dir or newest_checkpoint(), cfg.device, cfg.dtype)
    form = info["form"]
    if not prompt and form == "text":
        prompt = "def "
    elif not prompt and Path(cfg.benchmark).is_file():
        prompt = json.loads(open(cfg.benchmark, encoding="utf-8").readline())["instruction"]
    elif not prompt:
        die("no --prompt, nothing on standard input, and no problems in --benchmark to take one from")
    colour = sys.stderr.isatty()
    for n in range(cfg.num_samples if cfg.temperature else 1):
        print(f"# {prompt}", file=sys.stderr)
        shown = 0

        def show(_, text):
            nonlocal shown
            if len(text) < shown:  # an edit is drawn again
                print("\n# again:", file=sys.stderr)
                shown = text.rfind(lintseq.DIFF) + len(lintseq.DIFF)
            piece, shown = text[shown:], len(text)
            if colour and form == "edits":
                piece = piece.replace("<|diff|>", "\033[2m<|diff|>\033[0m").replace("@@ -", "\033[36m@@ -")
                piece = piece.replace("\n+", "\033[0m\n\033[32m+")
            print(piece, end="", file=sys.stderr, flush=True)

        raw, = complete(model, enc, form, [prompt], max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                        top_p=cfg.top_p, seeds=[cfg.seed + n], edit_retries=cfg.edit_retries, on_text=show)
        print("\033[0m" if colour else "", file=sys.stderr)
        if raw is None:
            die(f"the prompt leaves no room in the model's block_size={model.config.block_size}: shorten it")
        source, report = read_program(form, prompt, raw)
        if report["malformed"]:
            print(f"# {report['malformed']} of {report['hunks']} hunks were malformed and left out", file=sys.stderr)
        if cfg.out:
            path = Path(cfg.out) if n == 0 else Path(cfg.out).with_stem(f"{Path(cfg.out).stem}-{n}")
            path.write_text(source, encoding="utf-8")
            print(f"# {path}", file=sys.stderr)
        else:
            print(source)


if __name__ == "__main__":
    main()
