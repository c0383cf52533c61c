"""Finetuning throughput, packed as train.py packs against padded rows: response tokens a second, in one run.

    python tests/bench/finetune.py                           # a CPU: 33M, rows of 512, float32
    python tests/bench/finetune.py --shapes=150m,400m --out=tests/bench/results/finetune-h100.json

The examples are LintSeq's edit sequences of the standard library's functions that have a docstring, in a BPE of 4,000
entries trained on them: lengths as they fall. Padded as the paper does it, an example a row of block_size tokens, and as
a careful user would, each batch only to its longest. All do whole steps (forward, backward, clipping, AdamW) of as many
rows, and take turns. The last column is what 88,900 programs x 5 sequences x 2 epochs take at that rate.
"""
import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import ROOT, SHAPES, machine, timed_step

sys.path.insert(0, str(ROOT))
import lintseq  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def examples(folder, count):
    """Write `count` examples into folder, as prepare.py does: train.bin and train.examples.npy."""
    texts = []
    for n, pair in enumerate(prepare.stdlib_pairs()):
        try:
            edits = lintseq.lintseq(pair["response"], random.Random(n))
        except (ValueError, SyntaxError):
            continue
        texts.append(lintseq.training_text(pair["instruction"], edits))
        if len(texts) == count:
            break
    prepare.train_tokenizer(folder / "bench.tiktoken", ["".join(t) for t in texts], 4000)
    enc = prepare.get_tokenizer(str(folder / "bench.tiktoken"))  # and its special tokens
    tokens, table = [], []
    for prompt, response in texts:
        prompt, response = (enc.encode(text, allowed_special="all") for text in (prompt, response))
        table.append((len(tokens), len(tokens) + len(prompt)))
        tokens += prompt + response
    np.array(tokens, "<u2").tofile(folder / "train.bin")
    np.save(folder / "train.examples.npy", np.array(table))
    return len(texts)


def padded(rows, numbers, multiple):
    """Examples `numbers`, one a row, padded to the longest of them, rounded up to a multiple (of block_size: to that)."""
    T = min(rows.T, -(-max(int(rows.length[e]) for e in numbers) // multiple) * multiple)
    x, y = torch.zeros(len(numbers), T, dtype=torch.int64), torch.full((len(numbers), T), -1)
    for k, e in enumerate(numbers):
        b, n, first = rows.begin[e], rows.length[e], rows.response[e] - rows.begin[e] - 1
        tokens = torch.from_numpy(rows.tokens[b:b + n + 1].astype(np.int64))
        x[k, :n] = tokens[:-1]
        y[k, first:n] = tokens[1 + first:]
    return [x, y, None], int((y >= 0).sum())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of each; 0: 50 on a GPU, 5 on a CPU")
    parser.add_argument("--rows", type=int, default=0, help="rows of a step; 0: 32 on a GPU, 8 on a CPU")
    parser.add_argument("--length", type=int, default=0, help="block_size; 0: 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    B, T, steps = args.rows or (32 if cuda else 8), args.length or (1024 if cuda else 512), args.steps or (50 if cuda else 5)
    torch.set_float32_matmul_precision("high")
    if not cuda:
        train.keep_memory()
    dtype = torch.bfloat16 if cuda else torch.float32
    result = machine(dtype)
    with tempfile.TemporaryDirectory() as folder:
        n = examples(Path(folder), 20_000 if cuda else 2_000)
        rows = train.ExampleRows([Path(folder)], "train", SimpleNamespace(block_size=T, seed=1))
    full = rows.length.sum() / (rows.rows_in(1) * T)
    print(f"{result['device']}, torch {torch.__version__}; {n:,} examples of {rows.length.mean():.0f} tokens, "
          f"{rows.truncated} of them truncated to {T}; packed rows {full:.1%} full, padded {rows.length.mean() / T:.1%}")
    multiple = 256 if cuda else 1  # a GPU's step is compiled for each length
    order = np.random.default_rng(0).permutation(n).tolist()
    take = lambda k: [order[(k * B + j) % n] for j in range(B)]
    ways = {"packed": lambda k: train.batch_of(rows, [(k * B + j) % rows.rows_in(1) for j in range(B)], cuda),
            "padded to block_size": lambda k: padded(rows, take(k), T),
            "padded to the longest": lambda k: padded(rows, take(k), multiple)}
    for shape in (args.shapes or ("150m" if cuda else "33m")).split(","):
        models, times, targets = {}, {w: [] for w in ways}, dict.fromkeys(ways, 0)

        def step(way, tensors):
            model, call, optimizer = models[way]
            tensors = [None if t is None else t.to(device) for t in tensors]
            return timed_step(lambda: call(*tensors)[1], model, optimizer, device, dtype)

        for way in ways:
            model = GPT(GPTConfig(T, 4096, *SHAPES[shape])).to(device)
            call = torch.compile(model, dynamic=False) if cuda else model
            models[way] = model, call, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for length in range(multiple, T + 1, multiple) if cuda else ():
            step("padded to the longest", [torch.zeros(B, length, dtype=torch.int64)] * 2 + [None])
        for k in range(steps + 3):  # three of warm-up
            for way, batch in ways.items():
                tensors, count = batch(k)
                seconds = step(way, tensors)
                if k >= 3:
                    times[way].append(seconds)
                    targets[way] += count
        response = int((rows.end - rows.response).sum()) / n  # tokens an example
        speed = {way: targets[way] / sum(times[way]) for way in ways}
        for way in ways:
            hours = 88_900 * 5 * 2 * response / speed[way] / 3600
            row = {"shape": shape, "batch": B, "length": T, "what": way, "response tokens/s": round(speed[way]),
                   "seconds a step": round(statistics.median(times[way]), 4),
                   "packed is faster": round(speed["packed"] / speed[way], 2), "hours": round(hours, 1)}
            result["rows"].append(row)
            print(f"{shape} {B} x {T}  {way:22} {speed[way]:10,.0f} response tokens/s  packed is {row['packed is faster']:.2f} x "
                  f"as fast  {hours:,.1f} h", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
