"""Finetuning throughput, packed as train.py packs against padded rows: response tokens a second.

    python tests/bench/finetune.py                           # a CPU: 33M, rows of 512, float32
    python tests/bench/finetune.py --shapes=150m,400m --out=tests/bench/results/finetune-h200.json

The examples are LintSeq's edit sequences of the standard library's functions that have a docstring,
in a BPE of 4,000 entries trained on them: lengths as they fall. On a GPU packed rows go through
flash attention, each example for itself; a row apart shows them with a mask, as on a CPU. Padded as
the paper does it, an example a row of block_size tokens, and as a careful user would, each batch
only to its longest (on a GPU to 512 or 1,024 tokens: another graph for each length). All do whole
steps (forward, backward, clipping, AdamW) of as many rows, and take turns. The last column is what
88,900 programs x 5 sequences x 2 epochs take at that rate.
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
from config._demo_problems import stdlib_pairs  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def write_examples(folder, count):
    """Write `count` examples into folder, as prepare.py does: train.bin and train.examples.npy.
    Their number, and the tokens of their responses."""
    pairs = []
    for n, pair in enumerate(stdlib_pairs(60)):
        try:
            edits = lintseq.lintseq(pair["response"], random.Random(n))
        except (ValueError, SyntaxError):
            continue
        pairs.append((pair["instruction"], edits))
        if len(pairs) == count:
            break
    texts = ["\n".join((instruction, *edits)) for instruction, edits in pairs]
    prepare.train_tokenizer(folder / "bench.tiktoken", texts, 4000)
    enc = prepare.get_tokenizer(str(folder / "bench.tiktoken"))  # and its special tokens
    tokens, table = [], []
    for instruction, edits in pairs:
        prompt, response = prepare.encode_example(enc, "edits", instruction, edits)
        table.append((len(tokens), len(tokens) + len(prompt)))
        tokens += [*prompt, *response]
    np.array(tokens, "<u2").tofile(folder / "train.bin")
    np.save(folder / "train.examples.npy", np.array(table))
    return len(pairs), len(tokens) - sum(response - begin for begin, response in table)


def padded(rows, numbers, multiple):
    """Examples `numbers`, one a row, padded to the longest of them, rounded up to a multiple (of
    block_size: to that); and the number of targets."""
    longest = max(int(rows.length[e]) for e in numbers)
    length = min(rows.T, -(-longest // multiple) * multiple)
    batch = torch.zeros(2, len(numbers), length, dtype=torch.int64)
    batch[1] = -1
    for k, e in enumerate(numbers):
        b, n, first = rows.begin[e], rows.length[e], rows.first_target[e]
        tokens = torch.from_numpy(rows.tokens[b:b + n + 1].astype(np.int64))
        batch[0, k, :n] = tokens[:-1]
        batch[1, k, first:n] = tokens[1 + first:]
    return batch, int((batch[1] >= 0).sum())


class MaskedLoss(torch.nn.Module):
    """GPT.forward's loss of packed rows with a mask, as it is on a CPU."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, segments):
        mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        x = self.model.hidden(idx, torch.arange(idx.size(1), device=idx.device), mask)
        logits = torch.nn.functional.linear(x, self.model.head).flatten(0, 1).float()
        return None, torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def measure(shape, ways, rows, T, steps, multiple, device, dtype):
    """({way: seconds of each step}, {way: targets seen}); ways: {name: k -> (batch, targets)}."""
    cuda = device.type == "cuda"
    models, times, targets = {}, {way: [] for way in ways}, dict.fromkeys(ways, 0)

    def step(way, batch):
        model, forward, optimizer = models[way]
        batch = batch.to(device)
        return timed_step(lambda: forward(*batch)[1], model, optimizer, device, dtype)

    for way in ways:
        model = GPT(GPTConfig(T, 4096, *SHAPES[shape])).to(device)
        forward = MaskedLoss(model) if "mask" in way else model
        if cuda:  # packed for any number of examples, padded for each length
            forward = torch.compile(forward, dynamic=None if way == "packed" else False)
        models[way] = model, forward, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for length in range(multiple, T + 1, multiple) if cuda else ():  # compiled for each length
        step("padded to the longest", torch.zeros(2, rows, length, dtype=torch.int64))
    for k in range(steps + 3):  # three of warm-up
        for way, batch_of in ways.items():
            batch, count = batch_of(k)
            seconds = step(way, batch)
            if k >= 3:
                times[way].append(seconds)
                targets[way] += count
    return times, targets


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="")
    parser.add_argument("--steps", type=int, default=0, help="timed; 0: 50 on a GPU, 5 on a CPU")
    parser.add_argument("--rows", type=int, default=0, help="of a step; 0: 32 on a GPU, 8 on a CPU")
    parser.add_argument("--length", type=int, default=0, help="0: 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cpu"), torch.float32
    if cuda:
        device, dtype = torch.device("cuda"), torch.bfloat16
    B, T = args.rows or (32 if cuda else 8), args.length or (1024 if cuda else 512)
    torch.set_float32_matmul_precision("high")
    if not cuda:
        train.keep_freed_memory()
    result = machine(dtype)
    with tempfile.TemporaryDirectory() as folder:
        n, response = write_examples(Path(folder), 20_000 if cuda else 2_000)
        cfg = SimpleNamespace(block_size=T, seed=1, micro_batch=B)
        rows = train.ExampleRows(Path(folder), "train", cfg)
        rows.tokens = np.array(rows.tokens)  # the folder goes
    print(f"{result['device']}, torch {torch.__version__}; {n:,} examples of "
          f"{rows.length.mean():.0f} tokens; packed: {rows}; padded rows: "
          f"{rows.length.mean() / T:.1%} full")
    multiple = 512 if cuda else 1
    order = np.random.default_rng(0).permutation(len(rows.begin)).tolist()
    examples = lambda k: [order[(k * B + j) % len(order)] for j in range(B)]
    packed = lambda k: next(train.read_batches(rows, range(k * B, k * B + B), cfg, device))
    ways = {"packed": packed,
            "padded to block_size": lambda k: padded(rows, examples(k), T),
            "padded to the longest": lambda k: padded(rows, examples(k), multiple)}
    if cuda:  # on a CPU packed rows have one anyway
        ways["packed, with a mask"] = packed
    for shape in (args.shapes or ("150m" if cuda else "33m")).split(","):
        steps = args.steps or (50 if cuda else 5)
        times, targets = measure(shape, ways, B, T, steps, multiple, device, dtype)
        speed = {way: targets[way] / sum(times[way]) for way in ways}
        for way in ways:
            hours = 88_900 * 5 * 2 * response / n / speed[way] / 3600
            row = {"shape": shape, "batch": B, "length": T, "what": way,
                   "response tokens/s": round(speed[way]),
                   "seconds a step": round(statistics.median(times[way]), 4),
                   "packed is faster": round(speed["packed"] / speed[way], 2),
                   "hours": round(hours, 1)}
            result["rows"].append(row)
            print(f"{shape} {B} x {T}  {way:22} {speed[way]:10,.0f} response tokens/s  packed is "
                  f"{row['packed is faster']:.2f} x as fast  {hours:,.1f} h", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
