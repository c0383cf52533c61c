"""A prompt to a program: the model writes edits, each is applied as it ends, the program grows.

    python sample.py                                  # the newest checkpoint, a sample instruction
    python sample.py --prompt="Write a function that ..." --num_samples=3 --temperature=1
    echo "Write a function that ..." | python sample.py --init_from=out-150m-edits

The program goes to standard output or --out, what the model wrote (the edits, in colour on a
terminal) to standard error. Nothing that a model writes is run here. Left out: chat, and prompts
longer than the model's block_size.
"""
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Literal

import config
import lintseq
import prepare
from config import die
from lintseq import DIFF


class Settings:
    init_from = ""  # a folder with ckpt.pt, or a Hugging Face model; empty: out_dir, or the newest
    out_dir = ""  # where a config file's own training run wrote
    prompt = ""  # the instruction; empty: standard input, if piped in, else the benchmark's first
    benchmark = "data/demo-problems.jsonl"  # whose first instruction stands in for a prompt
    out = ""  # write the program to this file (with --num_samples=3: f.py, f-1.py, f-2.py)
    num_samples: (1,) = 1  # programs to write, with seeds seed, seed + 1, ... (temperature 0: one)
    max_new_tokens: (1,) = 512  # of a sample, at most
    temperature = 0.0  # 0 takes the likeliest token; the paper samples with 1 and top_p 0.95
    top_p: (0, 1) = 0.95  # nucleus
    edit_retries = 2  # how often an edit is drawn again if it is malformed or leaves linter errors
    seed = 1337  # of the first sample
    device = "auto"  # cuda if there is one, mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda, else float32


def note(text, **how):
    """Print it to standard error."""
    print(text, file=sys.stderr, **how)


def find_checkpoint():
    """The folder of the out*/ckpt.pt that was written last, or one line on how to get one."""
    newest = max(Path().glob("out*/ckpt.pt"), key=os.path.getmtime, default=None)
    return str(newest.parent) if newest else die(
        "no checkpoint (out*/ckpt.pt) yet: `make demo` trains some, "
        "or name a folder or a Hugging Face model with --init_from")


def load_model(init_from, device="auto", dtype="auto"):
    """(model on the device, its tokenizer); model.info holds its form, step, tokenizer, ...

    init_from: a folder with ckpt.pt (the tokenizer must be the one it was trained with) or a
    Hugging Face model, whose form is "form" in its config.json, else what its name says: edits for
    "LintSeq", programs for another "Instruct". SystemExit with one line if it cannot be had."""
    import torch  # here: --help and a wrong key need not wait for it
    from model import GPT, one_line
    device = config.pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        model = GPT.from_pretrained(init_from)
        name, info = Path(init_from).name.lower(), model.info
        info["form"] = info["form"] or (
            "edits" if "lintseq" in name else "programs" if "instruct" in name else "text")
        model = model.to(device, getattr(torch, dtype)).eval()
        enc = prepare.load_tokenizer(info)
        if enc.n_vocab > model.config.vocab_size:
            raise ValueError(f"{info['tokenizer']} is of another model: {enc.n_vocab} entries, "
                             f"where this one has {model.config.vocab_size}")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("its weights are not all finite: take an earlier checkpoint")
    except Exception as e:  # whatever is in the files
        best = Path(init_from, "best.pt")
        torn = "ckpt.pt cannot be read" in str(e) and best.is_file()
        foreign = "config.json cannot be read" in str(e)
        die(f"{init_from} on {device}: {one_line(e)}" + f"; put {best} in its place" * torn
            + "; nor is there a ckpt.pt, as train.py writes it" * foreign)
    return model, enc


def hash_weights(model):
    """A digest of what was really read: each parameter's name, type, kind of device and bytes, and
    the shape of the model. Half a second for 150M."""
    import torch
    total = hashlib.sha256(str(model.config).encode())
    for name, x in model.state_dict().items():
        total.update(f"{name} {x.dtype} {x.device.type}".encode())
        total.update(x.cpu().ravel().view(torch.uint8).numpy())
    return total.hexdigest()


def decode(enc, tokens):
    """Their text; a row of the embedding that no token has is nothing."""
    return enc.decode([token for token in tokens if token < enc.n_vocab])


def complete(model, enc, form, prompts, *, max_new_tokens, temperature, top_p, seeds, stop=(),
             edit_retries=0, batch_size=64, on_done=None, on_text=None):
    """A raw text for each prompt: what the model wrote up to end-of-text, a string of `stop` or
    max_new_tokens; None for a prompt that leaves no room in block_size.

    on_done(i, raw) is called as prompt i finishes, in any order; on_text(i, text) with its text so
    far, as whole characters come and as an edit goes. Edits are drawn again as EditChecker says."""
    ids = [prepare.encode_prompt(enc, form, prompt) for prompt in prompts]
    fits = [i for i, prompt in enumerate(ids) if 0 < len(prompt) < model.config.block_size]
    tokens, raws = [[] for _ in prompts], [None] * len(prompts)

    def text_of(new):
        text = decode(enc, new)
        for string in stop:
            text = text.split(string)[0]
        return text

    def stopped(new):  # a stop string ends in the last token, so it begins in the last few
        text = decode(enc, new[-24:])
        return any(string in text for string in stop)

    def on_token(j, token):
        i = fits[j]  # generate has only the prompts that fit
        if token is None:
            raws[i] = text_of(tokens[i])
            if on_done:
                on_done(i, raws[i])
            return
        if token < 0:
            del tokens[i][token:]
        else:
            tokens[i].append(token)
        if on_text and not decode(enc, tokens[i][-4:]).endswith("\ufffd"):  # half of a character
            on_text(i, text_of(tokens[i]))

    for i in range(len(ids)):
        if on_done and i not in fits:
            on_done(i, None)
    checkers = [EditChecker(enc, edit_retries) for _ in fits]
    model.generate([ids[i] for i in fits], max_new_tokens, temperature=temperature, top_p=top_p,
                   seeds=[seeds[i] for i in fits], stop_tokens=(enc.eot_token,),
                   stop=stop and stopped, batch_size=batch_size, on_token=on_token,
                   check_tokens=marker_ends(enc) if form == "edits" else (),
                   check=lambda j, new: checkers[j](new))
    return raws


def marker_ends(enc):
    """[the token with which <|diff|> ends]: its own, or the last of its spelling."""
    return [enc._special_tokens.get(DIFF, enc.encode_ordinary("\n" + DIFF)[-1])]


class EditChecker:
    """The program that one row's edits have made so far, as model.generate's `check`: an edit is
    applied when the marker after it has come, and drawn again, up to `retries` times, where it is
    malformed or leaves a program with linter errors."""

    def __init__(self, enc, retries):
        self.enc, self.retries = enc, retries
        self.lines, self.begin, self.tries = [], 0, 0  # the program and the tokens before this edit

    def __call__(self, new):
        text = decode(self.enc, new[self.begin:])
        if not text.endswith("\n" + DIFF):  # in a line of the program it is text
            return
        lines, report = list(self.lines), {"hunks": 0, "malformed": 0}
        edits = lintseq.split_edits(text)  # one, or at the end none
        for edit in edits:
            lintseq.apply_edit(lines, edit, report)
        if self.tries < self.retries and edits and (
                report["malformed"] or has_errors("\n".join(lines))):
            self.tries += 1
            return self.begin
        self.lines, self.begin, self.tries = lines, len(new), 0


def has_errors(program):
    """True, or the linter's list, where a program does not parse or the linter finds errors."""
    try:
        return lintseq.lint(program)
    except Exception:  # as the parser says it
        return True


def read_program(form, prompt, raw):
    """(the program, a report) of what the model wrote: edits applied, a whole program as it is, or
    a prompt and its continuation. The report counts edits, hunks, malformed ones (zero for
    programs)."""
    if form == "edits":
        return lintseq.apply_and_count(raw)
    return (prompt + raw if form == "text" else raw), {"edits": 0, "hunks": 0, "malformed": 0}


def find_prompt(cfg, form):
    """--prompt, what is piped in, or one to show something with."""
    prompt = cfg.prompt
    try:
        if not prompt and sys.stdin and not sys.stdin.isatty():  # None: closed
            prompt = sys.stdin.buffer.read().decode().rstrip("\n")
    except UnicodeError:
        die("standard input is not UTF-8")
    if prompt or form == "text":
        return prompt or "def "
    if not Path(cfg.benchmark).is_file():
        die("no --prompt, nothing on standard input, and no file of problems to take one from: "
            f"--benchmark={cfg.benchmark}")
    _, row = next(config.read_rows(cfg.benchmark), (0, "it is empty"))
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        die(f"--benchmark={cfg.benchmark}: no instruction in its first row ({row!s:.90}); "
            "give a --prompt")
    return row["instruction"]


COLOURS = {"@": "\033[36m@", "+": "\033[32m+", "<": "\033[35m<"}  # of a header, a line, a marker


def make_display(coloured):
    """on_text for `complete`: prints what is new, and says where an edit was taken back."""
    shown = 0

    def show(_, text):
        nonlocal shown
        if coloured:  # by what a line, or what follows a marker, begins with
            text = re.sub(r"(?m)(?:^|(?<=<\|diff\|>))[@+<]", lambda m: COLOURS[m[0]], text)
        if len(text) < shown:
            note("\n# again:")
            shown = len(text)
        note(text[shown:], end="", flush=True)
        shown = len(text)

    return show


def main():
    cfg = config.load(Settings)
    name = cfg.init_from or cfg.out_dir or find_checkpoint()
    model, enc = load_model(name, cfg.device, cfg.dtype)
    note(f"# {name}")
    form, coloured = model.info["form"], sys.stderr.isatty()
    prompt = find_prompt(cfg, form)
    for n in range(cfg.num_samples if cfg.temperature else 1):
        note(f"# {prompt}")
        raw, = complete(model, enc, form, [prompt], max_new_tokens=cfg.max_new_tokens,
                        temperature=cfg.temperature, top_p=cfg.top_p, seeds=[cfg.seed + n],
                        edit_retries=cfg.edit_retries,
                        on_text=make_display(coloured))
        if raw is None:
            tokens = len(prepare.encode_prompt(enc, form, prompt))
            die(f"the prompt's {tokens} tokens leave no room in the model's "
                f"block_size={model.config.block_size}: shorten it")
        note("\033[0m" if coloured else "")
        program, report = read_program(form, prompt, raw)
        if report["malformed"]:
            note(f"# malformed: {report['malformed']} of {report['hunks']} hunks")
        if cfg.out:
            path = Path(cfg.out)
            if n:
                path = path.with_stem(f"{path.stem}-{n}")
            config.write_whole(path, (program + "\n").encode())
            note(f"# {path}")
        else:
            print(program)


if __name__ == "__main__":
    config.run(main)
