"""Train a GPT: pretraining on text and finetuning on instruction data are one loop.

    python train.py config/demo.py                                   # one CPU or GPU
    torchrun --nproc_per_node=4 train.py config/150m.py              # four GPUs of one node
    python train.py --plot=loss.png out/log.jsonl out-muon/log.jsonl # the curves of runs

Reads data/<dataset>/ (prepare.py), writes out_dir/ckpt.pt (the last state, to go on from), best.pt
(the lowest validation loss, without the optimizer's state; none without validation data, or while
step 0 is the lowest; to sample from it, copy it as ckpt.pt into a folder of its own) and log.jsonl.
Run the same command again and it goes on where it stopped, with the settings it is given now;
Ctrl-C and SIGTERM save first.

Every epoch visits every row once, in an order that depends on the seed and the step alone: not on
ranks, nor on restarts. Nothing else is drawn after the first weights, so a checkpoint holds no
random state. Left out: mixtures of datasets (prepare.py mixes corpora), and sharding of model and
optimizer (the paper's models fit one GPU many times over).
"""
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
# Early on purpose: imported after init_process_group (by torch.compile, or the first step), its
# functions' default arguments keep the group alive, whose threads then abort Python's end
import torch.distributed.nn

import config
from config import LOCAL_RANK, RANK, WORLD, die, say
from model import GPT, GPTConfig, one_line

DATA = Path("data")


class Settings:
    out_dir = "out"  # checkpoints and log.jsonl go there
    dataset = "pretrain"  # data/<dataset>
    pretrained = ""  # finetuning: a folder with ckpt.pt or a Hugging Face model to start from
    seed: (0, 4_294_967_295) = 1337  # of the weights and of the order of the data
    # the model (from `pretrained` where that is set)
    block_size: (1,) = 1024  # tokens in a row
    n_layer: (1,) = 12  # blocks
    n_head: (1,) = 12  # attention heads in each
    n_embd: (1,) = 768  # width of the residual stream
    # the batch
    batch_size: (1,) = 1024  # rows of block_size tokens in an optimizer step, over all ranks
    micro_batch: (1,) = 32  # rows in a forward pass of a rank; passes are accumulated
    max_iters = 0  # optimizer steps; 0: as many as `epochs` need
    epochs: (1,) = 1  # passes over the data, where max_iters is 0
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW the rest
    learning_rate = 6e-4  # the highest, after the warm-up
    muon_lr = 0.02  # the same for Muon's matrices
    min_lr_ratio: (0, 1) = 0.1  # where the decay ends, as a fraction of learning_rate
    decay: Literal["cosine", "linear"] = "cosine"  # of the learning rate, after the warm-up
    warmup_iters = 2000  # steps of linear warm-up
    weight_decay = 0.1  # decoupled, on every matrix (there is nothing else)
    beta1: (0, 0.99999) = 0.9  # AdamW's
    beta2: (0, 0.99999) = 0.95  # AdamW's
    grad_clip = 1.0  # of the norm of all gradients; 0: off
    # the run
    eval_interval: (1,) = 1000  # steps between evaluations; each saves a checkpoint
    eval_rows = 2048  # validation rows in an evaluation, the same each time; 0: all of val.bin
    log_interval: (1,) = 10  # steps between lines
    device = "auto"  # cuda, mps or cpu; auto: the first that there is
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 where that is fast
    compile: Literal["auto", "yes", "no"] = "auto"  # on cuda
    wandb = ""  # a Weights & Biases project to log to
    plot = ""  # draw log.jsonl files (given as arguments; else out_dir's) into this PNG
    paths = ()  # the logs to draw


# -- Ranks -----------------------------------------------------------------------------------------

def join_ranks(cfg):
    """Meet the other ranks; the device of this one."""
    name = config.pick_device(cfg.device)
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
        torch.zeros(1, device=device)
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo",
                                    timeout=timedelta(minutes=10))
    except Exception as e:  # no such device, no such driver, an address that is taken
        die(f"device {name}, rank {RANK} of {WORLD}: {e!r:.200}")
    if name == "cuda":
        torch.cuda.set_device(device)
    elif name == "cpu":
        keep_freed_memory()
    return device


def pick_dtype(name, device):
    """A dtype's name; for "auto" bfloat16 where the device multiplies it faster than float32: on
    CUDA, and on CPUs with AVX512-BF16 or AMX (training is 1.9 times as fast at 150M, 1.3 at the
    demo's size)."""
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return name if name != "auto" else "bfloat16" if fast else "float32"


def keep_freed_memory():
    """Have glibc keep what is freed: it hands large blocks back to the kernel, which clears them
    anew in every step of a CPU. In bfloat16 that was a third of a step at 150M, an eighth at the
    demo's size; other C libraries lack it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def sum_over_ranks(x):
    """The sum of a tensor over all ranks, in place. One on the CPU goes through gloo, so that no
    rank waits for its GPU."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


# -- Data ------------------------------------------------------------------------------------------

class Rows:
    """The rows of a run, (2 or 3, T) int64 each: tokens, targets (-1 where there is no loss) and,
    where several examples share a row, the number of each token's example. An epoch holds every row
    once, in an order of the seed and the epoch alone: rows[i] is the i-th of the whole run, whoever
    asks."""

    def __init__(self, folder, split, cfg):
        path = folder / f"{split}.bin"
        self.tokens = np.memmap(path, "<u2", "r") if path.stat().st_size else np.zeros(0, "<u2")
        self.T, self.seed = cfg.block_size, cfg.seed if split == "train" else 0


class TextRows(Rows):
    """Pretraining text, cut into rows of block_size tokens (and the next one, a target only)."""

    def count(self, epochs=1):
        """Rows in so many epochs."""
        return max(0, len(self.tokens) - 1) // self.T * epochs

    @cache
    def order(self, epoch):  # 8 bytes a row and epoch, kept
        return np.random.default_rng((self.seed, epoch)).permutation(self.count())

    def __getitem__(self, i):
        epoch, i = divmod(i, self.count())
        at = self.order(epoch)[i] * self.T
        block = self.tokens[at:at + self.T + 1].astype(np.int64)
        return np.stack((block[:-1], block[1:]))

    def __str__(self):
        return f"{self.count():,} rows of text"


class ExampleRows(Rows):
    """Instruction data: whole examples packed into rows, loss on their responses alone. An example
    that is longer than block_size loses its end, as the paper's do; one that loses all of its
    response is left out. The plan of all epochs is held in memory, some 85 bytes an example and
    epoch (75 MB for 88,900 pairs * 5 sequences * 2 epochs)."""

    def __init__(self, folder, split, cfg):
        super().__init__(folder, split, cfg)
        path = folder / f"{split}.examples.npy"
        try:
            table = np.load(path)  # where each example and its response start
            if (np.diff(table.ravel(), prepend=0, append=len(self.tokens)) < 0).any():
                raise ValueError("its places are not in order")
            begin, response = table.T
        except Exception as e:  # whatever is in it
            die(f"{path} is not what prepare.py wrote ({e!r:.200}): delete {folder} and prepare it "
                "again")
        # A row of T inputs takes T + 1 tokens of an example, for the last is a target only. The
        # last token of the prompt predicts the first of the response.
        full_length = np.append(begin[1:], len(self.tokens)) - begin - 1
        length, first_target = np.minimum(full_length, self.T), np.maximum(response - begin - 1, 0)
        kept = first_target < length
        self.begin, self.length, self.first_target = begin[kept], length[kept], first_target[kept]
        self.truncated, self.left_out = (full_length[kept] > self.T).sum(), (~kept).sum()
        # rows, as lists of example numbers; how many there are up to the end of each epoch
        self.plan, self.epoch_ends = [], []

    def plan_epoch(self):
        """Shuffled, each example in turn goes into the fullest of the open rows that has room; the
        fullest is closed when over 256 are open (so rows stay a random mix)."""
        open_rows = []  # sorted (room, row number)
        rng = np.random.default_rng((self.seed, len(self.epoch_ends)))
        for e in rng.permutation(len(self.begin)).tolist():
            need = int(self.length[e])
            at = bisect_left(open_rows, (need,))
            if at < len(open_rows):
                room, r = open_rows.pop(at)
            else:
                room, r = self.T, len(self.plan)
                self.plan.append([])
            self.plan[r].append(e)
            insort(open_rows, (room - need, r))
            if len(open_rows) > 256:
                open_rows.pop(0)
        self.epoch_ends.append(len(self.plan))

    def count(self, epochs=1):
        while len(self.epoch_ends) < epochs:
            self.plan_epoch()
        return self.epoch_ends[epochs - 1]

    def __getitem__(self, i):
        while len(self.plan) <= i:
            self.plan_epoch()
        row, at = np.zeros((3, self.T), np.int64), 0
        row[1:] = -1
        for e in self.plan[i]:
            b, n, first_target = self.begin[e], self.length[e], self.first_target[e]
            row[0, at:at + n] = self.tokens[b:b + n]
            row[1, at + first_target:at + n] = self.tokens[b + first_target + 1:b + n + 1]
            row[2, at:at + n] = e
            at += n
        return row

    def __str__(self):
        return (f"{len(self.begin):,} examples in {self.count():,} rows, "
                f"{self.length.sum() / max(1, self.count() * self.T):.1%} full, {self.truncated:,} "
                f"truncated, {self.left_out:,} left out (response cut off)")


def read_batches(rows, numbers, cfg, device):
    """Yield rows `numbers` as (2 or 3, B, T) tensors on the device, B at most micro_batch, each
    with the number of its targets."""
    for at in range(0, len(numbers), cfg.micro_batch):
        batch = torch.from_numpy(np.stack(
            [rows[i] for i in numbers[at:at + cfg.micro_batch]], axis=1))
        targets = int((batch[1] >= 0).sum())
        batch = batch.pin_memory() if device.type == "cuda" else batch
        yield batch.to(device, non_blocking=True), targets


def read_step(rows, step, cfg, device):
    """This rank's batches: rows step * batch_size + rank, + ranks, ... of the run's order."""
    numbers = range(step * cfg.batch_size + RANK, (step + 1) * cfg.batch_size, WORLD)
    return list(read_batches(rows, numbers, cfg, device))


def fingerprint_files(paths):
    """A hash of the sizes of files and of 256 pages spread over each: that data is still the same,
    in milliseconds."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        digest.update(str(size).encode())
        with open(path, "rb") as f:
            for i in range(256):
                f.seek(max(0, size - 4096) * i // 255)
                digest.update(f.read(4096))
    return digest.hexdigest()[:12]


def read_meta(folder):
    """What a checkpoint keeps of the data that it was trained on: its tokenizer, form, sizes and
    hash."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        bins = [folder / "train.bin", folder / "val.bin"]
        counts = [meta[path.stem]["tokens"] for path in bins]
        if counts != [path.stat().st_size / 2 for path in bins]:
            raise ValueError("train.bin and val.bin hold other numbers of tokens")
        data = [[*counts, fingerprint_files(bins + sorted(folder.glob("*.npy")))]]
        kept = ("tokenizer", "fingerprint", "vocab_size", "form")
        return {k: meta[k] for k in kept} | {"data": data}
    except FileNotFoundError as e:
        file = next((a for a in sys.argv[1:] if a.endswith(".py")), "--corpora=FOLDER")
        die(f"{e.filename} is missing: python prepare.py {file} --dataset={folder.name} writes it")
    except Exception as e:  # no JSON, or another's
        die(f"{folder}/meta.json is not what prepare.py wrote ({e!r}): delete {folder} and prepare "
            "it again")


def make_rows(folder, form, cfg):
    """Training and validation rows; says what they are."""
    kind = TextRows if form == "text" else ExampleRows
    train_rows, val_rows = (kind(folder, split, cfg) for split in ("train", "val"))
    if not train_rows.count():
        die(f"{folder}: nothing to train on in rows of block_size={cfg.block_size} tokens "
            f"({train_rows}): change --block_size or prepare more data")
    say(f"training: {train_rows}; validation: {val_rows}")
    if not val_rows.count():
        say(f"{folder}/val.bin holds less than a row: no validation loss, and no best.pt")
    return train_rows, val_rows


# -- The model and the optimizer -------------------------------------------------------------------

def make_model(cfg, meta, checkpoint):
    """The model to begin with, float32: new, or `pretrained`, in whose tokenizer the data must
    be. Where the run goes on from a checkpoint its weights come from there."""
    if cfg.pretrained and checkpoint:
        return GPT(GPTConfig(**checkpoint["config"]))
    if not cfg.pretrained:
        try:
            vocab_size = 64 * math.ceil(meta["vocab_size"] / 64)
            return GPT(GPTConfig(cfg.block_size, vocab_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
        except ValueError as e:
            die(e)
    try:
        model = GPT.from_pretrained(cfg.pretrained)
        if "fingerprint" not in model.info:  # a published model
            import prepare
            prepare.load_tokenizer(model.info)
    except Exception as e:  # whatever is in the files
        die(f"pretrained={cfg.pretrained}: {one_line(e)}")
    if model.info["fingerprint"] != meta["fingerprint"]:
        die(f"pretrained={cfg.pretrained} has another tokenizer than data/{cfg.dataset} "
            f"({meta['tokenizer']}): prepare the data with the model's tokenizer")
    return model.float()


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024): each matrix moves along the orthogonal matrix nearest to its
    Nesterov momentum, found by five Newton-Schulz steps, for all matrices of a shape at once.
    torch.optim.Muon takes one after the other, in bfloat16; this one multiplies as autocast says,
    and it cuts fused weights into their `pieces` (q, k, v; gate, up). An update is scaled by
    sqrt(rows / columns) where that is above 1."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, pieces=1))

    @torch.no_grad()
    def step(self):
        alike = defaultdict(list)  # {shape, rows <= columns: [(matrix, update, rate)]}
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for matrix, update in zip(*(t.chunk(group["pieces"])
                                            for t in (p, p.grad.lerp(momentum, 0.95)))):
                    rows, columns = matrix.shape
                    rate = group["lr"] * max(1, rows / columns) ** 0.5
                    if rows > columns:  # the smaller products
                        matrix, update = matrix.mT, update.mT
                    alike[matrix.shape].append((matrix, update, rate))
        for matrices, updates, rates in (zip(*some) for some in alike.values()):
            for matrix, update, rate in zip(matrices, orthogonalize(torch.stack(updates)), rates):
                matrix.sub_(update, alpha=rate)


def orthogonalize(g):
    """Newton-Schulz iteration towards U V^T of each matrix of g (B, n, m), n <= m, with Muon's
    quintic."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def make_optimizers(model, cfg, saved):
    """AdamW for all weights, or for all but the matrices of the blocks, which Muon takes; with the
    running averages of the `saved` ones, but the rates that are asked for now. All weights are
    matrices (the norms have none), so weight decay holds for all."""
    muon, adamw = [], []
    for name, p in model.named_parameters():
        if cfg.optimizer == "muon" and name.startswith("blocks."):
            pieces = 3 if "qkv" in name else 2 if "gate_up" in name else 1
            muon.append(dict(params=[p], pieces=pieces))
        else:
            adamw.append(p)
    optimizers = [torch.optim.AdamW(adamw, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                    weight_decay=cfg.weight_decay, fused=True)]
    if muon:
        optimizers.append(Muon(muon, cfg.muon_lr, cfg.weight_decay))
    for optimizer, state in zip(optimizers, saved):
        optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    return optimizers


def learning_rate_scale(step, max_iters, cfg):
    """The learning rate at a step as a fraction of its peak: linear warm-up, then cosine or linear
    down to min_lr_ratio. Another schedule: a word in Settings.decay, a function of `done` here."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / (max_iters - cfg.warmup_iters)
    left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.decay]
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


def set_learning_rates(optimizers, scale, cfg):
    """Scale the peaks, of each optimizer in make_optimizers' order; what is used now, for the
    log."""
    rates = {"lr": cfg.learning_rate * scale}
    if cfg.optimizer == "muon":
        rates["muon_lr"] = cfg.muon_lr * scale
    for optimizer, rate in zip(optimizers, rates.values(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rates


# -- Checkpoints -----------------------------------------------------------------------------------

def save_checkpoint(path, checkpoint):
    """torch.save into a temporary file in the same folder, flush to disk, rename: a crash leaves
    the old file whole. Rank 0's alone."""
    tmp = path.with_suffix(".tmp")
    if RANK:
        return
    try:
        with open(tmp, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # a full disk
        tmp.unlink(missing_ok=True)
        die(f"cannot write {path} ({e!r:.200}); the one before it is whole: make room, then the "
            "same command goes on from there")
    os.replace(tmp, path)


def read_checkpoint(path):
    """What save_checkpoint wrote, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["meta"]["fingerprint"], checkpoint["evaluated"]  # KeyError: not train.py's
        return checkpoint
    except Exception as e:  # whatever the bytes of a torn or another file bring up
        best = path.with_name("best.pt")
        mend = f"put {best} in its place, or " if best.exists() else ""
        die(f"{path} cannot be read ({e!r:.200}); {mend}delete it to start anew")


def check_same_run(path, checkpoint, must_match):
    """Refuse a checkpoint that this run cannot go on from."""
    changed = [f"{k} was {checkpoint[key].get(k)!r}, is {v!r}" for key, now in must_match.items()
               for k, v in now.items() if checkpoint[key].get(k) != v]
    if changed:
        die(f"{path} is of another run: {'; '.join(changed)}; set it back or choose another "
            "--out_dir")


def describe_changes(checkpoint, cfg):
    """The settings that differ from the checkpoint's, as text for the line that says the run goes
    on."""
    was = checkpoint.get("settings", {})
    changed = [f"{k}: {was[k]} -> {v}" for k, v in vars(cfg).items()
               if was.get(k, v) != v]
    if "optimizers" not in checkpoint:
        changed.append("the optimizer starts anew: this is a best.pt, which holds none")
    return ", ".join(changed) or "nothing changed"


# -- What main looks at now and then ---------------------------------------------------------------

@torch.no_grad()
def evaluate(model, rows, cfg, device, autocast):
    """Mean loss over the targets of eval_rows rows, the same each time; each rank takes its
    share."""
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of targets
    mine = range(rows.count())[:cfg.eval_rows or None][RANK::WORLD]
    for batch, targets in read_batches(rows, mine, cfg, device):
        with autocast:
            total += torch.tensor([model(*batch)[1].item() * targets, targets])
    sum_over_ranks(total)
    return (total[0] / total[1]).item()


def check_finite(value, what, ckpt):
    """End the run where it is not; all ranks find it alike."""
    if not math.isfinite(value):
        there = f"goes on from {ckpt}, the last good state" if ckpt.exists() else "starts anew"
        die(f"{what} is not finite ({value}): lower --learning_rate (with Muon --muon_lr too); the "
            f"same command {there}")


def open_log(path, step):
    """The log without its lines past `step`, and half of one: those steps are done again. With -1
    it is empty: of an earlier run not even step 0's line stays."""
    rows = config.read_rows(path) if path.exists() else ()
    kept = [row for _, row in rows if isinstance(row, dict) and row.get("step", 0) <= step]
    config.write_jsonl(path, kept)
    return open(path, "a", buffering=1)


# GPUs' dense bf16 peaks in TFLOP/s (makers' data sheets)
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "4090": 165}


def find_peak(device):
    """The device's peak in FLOP/s, for MFU; infinite where it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return 1e12 * next((peak for gpu, peak in PEAKS.items() if gpu in name), math.inf)


# -- The run ---------------------------------------------------------------------------------------

def main():
    cfg = config.load(Settings)
    if cfg.plot:
        return plot_logs(cfg.paths or (f"{cfg.out_dir}/log.jsonl",), cfg.plot)
    if cfg.paths:
        die(f"{cfg.paths[0]}: a config file lives in config/ and ends in .py; logs go with --plot")
    if cfg.batch_size % WORLD:
        die(f"batch_size={cfg.batch_size} is not a multiple of the {WORLD} ranks")
    device = join_ranks(cfg)
    cfg.dtype = pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32 on a GPU
    torch.manual_seed(cfg.seed)

    # data, model and optimizer: new, from pretrained weights, or from this run's own checkpoint
    out, ckpt = Path(cfg.out_dir), Path(cfg.out_dir, "ckpt.pt")
    lock = config.lock_file(out / f".lock{RANK}")  # noqa: F841  held to the end
    meta = read_meta(DATA / cfg.dataset)
    checkpoint = read_checkpoint(ckpt) if ckpt.exists() else {}
    model = make_model(cfg, meta, checkpoint)
    cfg.block_size = min(cfg.block_size, model.config.block_size)
    train_rows, val_rows = make_rows(DATA / cfg.dataset, meta["form"], cfg)
    max_iters = cfg.max_iters or math.ceil(train_rows.count(cfg.epochs) / cfg.batch_size)
    order = {k: vars(cfg)[k] for k in ("batch_size", "block_size", "seed", "optimizer", "dataset")}
    must_match = {"config": asdict(model.config), "meta": meta, "order": order}  # a checkpoint's
    step, best, last_eval = 0, math.inf, -1
    if checkpoint:
        check_same_run(ckpt, checkpoint, must_match)
        model.load_state_dict(checkpoint.pop("model"))
        step, best, last_eval = (checkpoint[k] for k in ("step", "best", "evaluated"))
        if step > max_iters or step == max_iters == last_eval:
            return say(f"{out} is finished ({step:,} steps): raise --max_iters, or delete it and "
                       "begin anew")
        say(f"going on from {ckpt} at step {step:,} ({describe_changes(checkpoint, cfg)})")
    model.to(device)
    optimizers = make_optimizers(model, cfg, checkpoint.pop("optimizers", ()))

    compiled = cfg.compile == "yes" or cfg.compile == "auto" and device.type == "cuda"
    forward = torch.compile(model) if compiled else model
    # batch_size rows a step = ranks * accumulated passes * rows a pass (the last may have fewer)
    pass_rows = min(cfg.micro_batch, cfg.batch_size // WORLD)
    passes = math.ceil(cfg.batch_size / WORLD / pass_rows)
    step_tokens = cfg.batch_size * cfg.block_size
    say(f"{model.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens a row, "
        f"{step_tokens:,} a step ({WORLD} x {passes} x {pass_rows} rows), {max_iters:,} steps, "
        f"{device}, {cfg.dtype}")
    if cfg.warmup_iters >= max_iters:
        say(f"warmup_iters={cfg.warmup_iters:,}: the learning rate rises until the run ends")
    log = open_log(out / "log.jsonl", step if checkpoint else -1) if RANK == 0 else None
    if cfg.wandb and RANK == 0:
        import wandb
        wandb.init(project=cfg.wandb, config=vars(cfg))
    stop = []  # the signal that asks us to end: save first
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))

    def record(**values):
        line = {"step": step, "tokens": step * step_tokens, **values}
        if log:
            log.write(json.dumps(line) + "\n")
            if cfg.wandb:
                wandb.log(line, step=step)

    def save():
        state = must_match | {"model": model.state_dict(), "step": step, "best": best,
                       "evaluated": last_eval, "settings": vars(cfg)}
        if last_eval == step and val == best:  # first: killed in between, a run makes both again
            save_checkpoint(out / "best.pt", state)
        save_checkpoint(ckpt, state | {"optimizers": [o.state_dict() for o in optimizers]})

    batches, val = read_step(train_rows, step, cfg, device), math.nan  # nan: best.pt is left alone
    while True:
        if last_eval != step and (step % cfg.eval_interval == 0 or step == max_iters):
            if val_rows.count():
                val = evaluate(model, val_rows, cfg, device, autocast)
                check_finite(val, f"validation loss at step {step:,}", ckpt)
                say(f"step {step:,}: validation loss {val:.4f}")
                record(val_loss=val)
                best = min(best, val)
            last_eval = step
            if step:
                save()
        if step == max_iters:
            break

        config.adapt_threads()
        begun = time.monotonic()
        # over all ranks: the targets of this step, and who was asked to stop, which ends them all
        counts = torch.tensor([sum(n for _, n in batches), len(stop)])
        targets, asked = sum_over_ranks(counts).tolist()
        if asked:
            save()
            sum_over_ranks(torch.zeros(1))  # all have saved: torchrun kills the rest when one ends
            say(f"asked to stop: saved {ckpt} at step {step:,}; the same command goes on from it")
            break

        rates = set_learning_rates(optimizers, learning_rate_scale(step, max_iters, cfg), cfg)
        total = torch.zeros((), device=device)
        for batch, n in batches:
            with autocast:
                loss = forward(*batch)[1]
            # a mean over all targets of the step, on whichever rank and in whichever pass they are
            (loss * (n / targets)).backward()
            total += loss.detach() * (n / targets)
        for p in model.parameters():
            sum_over_ranks(p.grad)
        if step + 1 < max_iters:
            batches = read_step(train_rows, step + 1, cfg, device)  # while the device works
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        check_finite(norm, f"the gradient at step {step + 1:,}, rows {step * cfg.batch_size:,} to "
                     f"{(step + 1) * cfg.batch_size - 1:,} of the order,", ckpt)
        for optimizer in optimizers:
            with autocast:  # for Muon's products
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % cfg.log_interval == 0 or step in (1, max_iters):
            loss = sum_over_ranks(total).item()
            speed = step_tokens / (time.monotonic() - begun)
            mfu = speed * model.flops_per_token(cfg.block_size) / (WORLD * find_peak(device))
            left = timedelta(seconds=round((max_iters - step) * step_tokens / speed))
            say(f"step {step:>6,}/{max_iters:,} | loss {loss:.4f} | lr {rates['lr']:.1e} | norm "
                f"{norm:.2f} | {speed:,.0f} tok/s | " + (f"MFU {mfu:.1%} | " if mfu else "")
                + f"{left} left")
            record(loss=loss, **rates, norm=norm, tokens_per_second=speed, mfu=mfu)

    if WORLD > 1:
        dist.destroy_process_group()
    raise SystemExit(128 + stop[0] if stop else 0)


def plot_logs(paths, png):
    """Draw training and validation loss over tokens of each log.jsonl."""
    import matplotlib.pyplot as plt
    for path in paths:
        lines = [x for _, x in config.read_rows(path) if isinstance(x, dict) and "tokens" in x]
        if not lines:
            die(f"{path} is not the log.jsonl of a run")
        for key in ("loss", "val_loss"):
            at = [x for x in lines if key in x]
            plt.semilogy([x["tokens"] for x in at], [x[key] for x in at], label=f"{path}: {key}")
    plt.xlabel("tokens")
    plt.legend()
    plt.savefig(png, format="png")
    print(png)


if __name__ == "__main__":
    config.run(main)
