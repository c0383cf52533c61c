"""Train a GPT: pretraining on text and finetuning on instruction data are one loop.

    python train.py config/demo.py                                      # one CPU or GPU
    torchrun --nproc_per_node=4 train.py config/150m.py                 # four GPUs of one node
    python train.py --plot out/log.jsonl out-muon/log.jsonl             # curves of runs, as a PNG

Reads data/<dataset>/ (prepare.py), writes out_dir/ckpt.pt (the last state, to go on from), best.pt (the lowest
validation loss) and log.jsonl. Run the same command again and it goes on where it stopped; Ctrl-C and SIGTERM save first.

Every epoch visits every block once, in an order that depends on the seed and the step alone: not on ranks, nor on
restarts. Nothing else is drawn after the first weights, so a checkpoint holds no random state. Left out: model and
optimizer sharding (the paper's models fit one GPU many times over).
"""
import ctypes
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import config
from model import GPT, GPTConfig

DATA = Path("data")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


class Settings:
    out_dir = "out"  # checkpoints and log.jsonl go there
    dataset = "pretrain"  # data/<dataset>; several, comma-separated, are mixed by their sizes
    pretrained = ""  # finetuning: a folder with ckpt.pt or a Hugging Face model, whose weights are the start
    seed = 1337  # of the weights and of the order of the data
    # the model (from `pretrained` where that is set)
    block_size = 1024  # tokens in a row
    n_layer = 12  # blocks
    n_head = 12  # attention heads in each
    n_embd = 768  # width of the residual stream
    n_hidden = 0  # width of SwiGLU; 0: 4 * n_embd
    # the batch
    batch_size = 1024  # rows of block_size tokens in an optimizer step, over all ranks
    micro_batch = 32  # rows in one forward pass of one rank; batch_size / (micro_batch * ranks) are accumulated
    max_iters = 0  # optimizer steps; 0: as many as `epochs` need
    epochs = 1  # passes over the data, where max_iters is 0
    # the optimizer
    optimizer = "adamw"  # or "muon": orthogonalized momentum for the matrices of the blocks, AdamW for the embedding
    learning_rate = 6e-4  # the highest, after the warm-up
    muon_lr = 0.02  # the same for Muon's matrices
    min_lr = 0.1  # where the decay ends, as a fraction of learning_rate
    decay = "cosine"  # or "linear"
    warmup_iters = 2000  # steps of linear warm-up
    weight_decay = 0.1  # decoupled, on every matrix (there is nothing else)
    beta1 = 0.9  # AdamW's
    beta2 = 0.95  # AdamW's
    grad_clip = 1.0  # of the norm of all gradients; 0: off
    # the run
    eval_interval = 1000  # steps between evaluations; each saves a checkpoint
    eval_rows = 2048  # validation rows in an evaluation, the same each time; 0: all of val.bin
    log_interval = 10  # steps between lines
    device = "auto"  # cuda if there is one, mps, else cpu
    dtype = "auto"  # bfloat16 on cuda, else float32
    compile = "auto"  # "yes", "no"; auto: on cuda
    wandb = ""  # a Weights & Biases project to log to
    plot = False  # draw log.jsonl files (given as arguments) into plot.png
    paths = ()  # the logs to draw


def die(message):
    print(f"train.py: {f'rank {RANK}: ' if RANK else ''}{message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def keep_memory():
    """Have glibc keep what is freed: it hands large blocks back to the kernel, which clears them anew in every step of a
    CPU (a sixth of its time at 150M). Other C libraries have their own ways."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


# -- Data: row i of the whole run, whoever asks -----------------------------------------------------------------------

def permuted(i, n, key):
    """The i-th element of a pseudorandom permutation of range(n): four Feistel rounds over the next power of four,
    walked until the result falls below n (fewer than four steps on average), so that no permutation is ever held."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            h = (right * 0x9E3779B97F4A7C15 + key + r * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            h = ((h ^ (h >> 31)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((h ^ (h >> 29)) & mask)
        i = left << half | right
        if i < n:
            return i


class TextRows:
    """Pretraining text: the bins laid end to end and cut into blocks of block_size tokens (and the next one)."""

    def __init__(self, folders, split, cfg):
        self.T, self.seed = cfg.block_size, cfg.seed
        self.bins = [np.memmap(f / f"{split}.bin", dtype="<u2", mode="r") for f in folders]
        self.ends = np.cumsum([(len(b) - 1) // self.T for b in self.bins])
        self.n = int(self.ends[-1])  # rows an epoch
        if self.n < 1:
            die(f"{folders[0]}/{split}.bin holds less than one row of block_size={self.T} tokens")

    def rows_in(self, epochs):
        return self.n * epochs

    def row(self, i, shuffle=True):
        """Tokens, targets, segments of the run's i-th row; (T,) arrays, segments None."""
        epoch, i = divmod(i, self.n)
        if shuffle:
            i = permuted(i, self.n, self.seed * 1_000_003 + epoch)
        b = int(np.searchsorted(self.ends, i, side="right"))
        at = (i - (int(self.ends[b - 1]) if b else 0)) * self.T
        block = self.bins[b][at:at + self.T + 1].astype(np.int64)
        return block[:-1], block[1:], None


class ExampleRows:
    """Instruction data: whole examples packed into rows, loss on their responses alone. An example that is longer
    than block_size loses its end, as the paper's do. Held in memory: 2 bytes a token, and the plan of all epochs, some
    50 bytes an example and epoch (45 MB for 88,900 pairs * 5 sequences * 2 epochs)."""

    def __init__(self, folders, split, cfg):
        self.T, self.seed, self.plan, self.epochs = cfg.block_size, cfg.seed, [], 0
        self.tokens = np.concatenate([np.fromfile(f / f"{split}.bin", dtype="<u2") for f in folders])
        tables, base = [], 0
        for f in folders:
            tables.append(np.load(f / f"{split}.examples.npy") + base)
            base += os.path.getsize(f / f"{split}.bin") // 2
        table = np.concatenate(tables)
        self.begin, self.response = table[:, 0], table[:, 1]
        self.end = np.append(table[1:, 0], len(self.tokens))
        # A row of T inputs takes examples of T + 1 tokens in all: an example's last token is a target only.
        self.length = np.minimum(self.end - self.begin - 1, self.T)
        self.truncated = int((self.end - self.begin - 1 > self.T).sum())

    def pack(self, epoch):
        """One epoch's rows, lists of example numbers: shuffled, then each example in turn into the fullest of the open
        rows that has room, the fullest closed when over 256 are open (so rows stay a random mix)."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.begin))
        rows, open_rows = [], []  # open_rows: sorted (room, row number)
        for e in order.tolist():
            need = int(self.length[e])
            at = bisect_left(open_rows, (need, -1))
            if at < len(open_rows):
                room, r = open_rows.pop(at)
            else:
                room, r = self.T, len(rows)
                rows.append([])
            rows[r].append(e)
            insort(open_rows, (room - need, r))
            if len(open_rows) > 256:
                open_rows.pop(0)
        return rows

    def rows_in(self, epochs):
        while self.epochs < epochs:
            self.plan += self.pack(self.epochs)
            self.epochs += 1
        return len(self.plan)

    def row(self, i, shuffle=True):
        """Tokens, targets (-1 where there is no loss), segments of the run's i-th row; (T,) arrays."""
        tokens, targets = np.zeros(self.T, np.int64), np.full(self.T, -1)
        segments, at = np.full(self.T, -1), 0
        while i >= len(self.plan):
            self.rows_in(self.epochs + 1)
        for e in self.plan[i]:
            b, n = self.begin[e], self.length[e]
            tokens[at:at + n] = self.tokens[b:b + n]
            first = self.response[e] - b - 1  # the prompt's last token predicts the response's first
            targets[at + first:at + n] = self.tokens[b + first + 1:b + n + 1]
            segments[at:at + n] = e
            at += n
        return tokens, targets, segments


def batch_of(rows, numbers, pin, shuffle=True):
    """Stack rows into (B, T) tensors in (pinned) memory: [idx, targets, segments or None], and the number of targets."""
    tensors = [None if c[0] is None else torch.from_numpy(np.stack(c))
               for c in zip(*(rows.row(i, shuffle) for i in numbers))]
    return [t.pin_memory() if pin and t is not None else t for t in tensors], int((tensors[1] >= 0).sum())


def fingerprint(paths):
    """A hash of the sizes of files and of 256 pages spread over each: that data is still the same, in milliseconds."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        digest.update(str(size).encode())
        with open(path, "rb") as f:
            for i in range(256):
                f.seek(max(0, size - 4096) * i // 255)
                digest.update(f.read(4096))
    return digest.hexdigest()[:12]


def open_data(cfg):
    """(training rows, validation rows, meta) of cfg.dataset; one line and out if something is missing."""
    folders = [DATA / name for name in cfg.dataset.split(",")]
    for f in folders:
        if not (f / "meta.json").is_file():
            die(f"{f}/meta.json is missing: python prepare.py with the same config file writes it")
    metas = [json.loads((f / "meta.json").read_text()) for f in folders]
    for f, m in zip(folders, metas):
        if (m["fingerprint"], m["form"]) != (metas[0]["fingerprint"], metas[0]["form"]):
            die(f"{f} ({m['form']}, {m['tokenizer']}) and {folders[0]} ({metas[0]['form']}, {metas[0]['tokenizer']}) "
                "do not go together: a mixture has one tokenizer and one form")
    kind = TextRows if metas[0]["form"] == "text" else ExampleRows
    meta = {k: metas[0][k] for k in ("tokenizer", "fingerprint", "vocab_size", "form")}
    meta["data"] = [[m["train"]["tokens"], m["val"]["tokens"], fingerprint(sorted(f.glob("*.bin")) + sorted(
        f.glob("*.npy")))] for f, m in zip(folders, metas)]
    return kind(folders, "train", cfg), kind(folders, "val", cfg), meta


# -- The optimizer ----------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024): each matrix moves along the orthogonal matrix nearest to its Nesterov momentum, found
    by five Newton-Schulz steps. torch.optim.Muon does so in bfloat16, matrix by matrix; this one takes all matrices of
    a shape in one batched product, in float32 on a CPU, and cuts fused weights into their `pieces` (q, k, v; gate, up).
    An update is scaled by sqrt(rows / columns) where that is above 1."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, pieces=1))

    @torch.no_grad()
    def step(self):
        shapes = {}  # {(rows, columns): [(piece of a weight, piece of its update, group)]}
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                for weight, u in zip(p.chunk(group["pieces"]), update.chunk(group["pieces"])):
                    shapes.setdefault(u.shape, []).append((weight, u, group))
        for (rows, columns), pieces in shapes.items():
            for (weight, _, group), u in zip(pieces, orthogonalize(torch.stack([u for _, u, _ in pieces]))):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(u, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(g):
    """Newton-Schulz iteration towards (U V^T) of each (n, m) matrix of g (B, n, m), with Muon's quintic."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).to(g.dtype)


def make_optimizers(model, cfg, device):
    """A list of optimizers; in each group `peak` is the learning rate that the schedule scales. All parameters are
    matrices (the norms have none), so weight decay holds for all."""
    adamw = lambda params: torch.optim.AdamW(
        [dict(params=params, peak=cfg.learning_rate)], lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "adamw":
        return [adamw(list(model.parameters()))]
    if cfg.optimizer != "muon":
        die(f"optimizer={cfg.optimizer!r} is neither 'adamw' nor 'muon'")
    pieces = {"attn.qkv.weight": 3, "mlp.gate_up.weight": 2}
    groups = [dict(params=[p for name, p in model.named_parameters() if name != "wte.weight" and pieces.get(
        name.split(".", 2)[-1], 1) == n], pieces=n, peak=cfg.muon_lr) for n in (1, 2, 3)]
    return [adamw([model.wte.weight]), Muon(groups, lr=cfg.muon_lr, weight_decay=cfg.weight_decay)]


def lr_scale(step, max_iters, cfg):
    """The learning rate at a step as a fraction of its peak: linear warm-up, then cosine or linear down to min_lr."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, max_iters - cfg.warmup_iters)
    left = 1 - done if cfg.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + (1 - cfg.min_lr) * left


# -- Checkpoints ------------------------------------------------------------------------------------------------------

def save(path, checkpoint):
    """torch.save into a temporary file in the same folder, flush to disk, rename: a crash leaves the old file whole."""
    tmp = path.with_suffix(".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # a full disk
        tmp.unlink(missing_ok=True)
        die(f"cannot write {path} ({str(e).splitlines()[0]}); the one before it is whole: make room, then the same "
            "command goes on from there")
    os.replace(tmp, path)


def load_checkpoint(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        die(f"{path} cannot be read ({str(e).splitlines()[0]}); delete it to start anew, or put best.pt in its place")


# GPUs' dense bf16 peaks in TFLOP/s (makers' data sheets), for MFU
PEAKS = {"H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
         "4090": 165, "3090": 71, "5090": 210}


def all_sum(x):
    """The sum of a tensor over all ranks, in place. On the CPU it goes through gloo, and no rank waits for its GPU."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def main():
    cfg = config.load(Settings)
    if cfg.plot:
        return plot(cfg.paths)
    if cfg.paths:
        die(f"{cfg.paths[0]}: a config file lives in a folder named config/; logs go with --plot")
    for key in ("block_size", "batch_size", "micro_batch", "eval_interval", "log_interval"):
        if getattr(cfg, key) < 1:
            die(f"{key}={getattr(cfg, key)} must be at least 1")

    # where we are: one process, or one of torchrun's
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else (
        "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and local >= torch.cuda.device_count():
        die(f"device=cuda: this machine has {torch.cuda.device_count()} GPUs, the process wants number {local + 1}")
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_memory()
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timeout=timedelta(minutes=10))
    say = (lambda line: print(line, flush=True)) if RANK == 0 else lambda line: None
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in ("bfloat16", "float32"):
        die(f"dtype={dtype!r} is neither 'bfloat16' nor 'float32'")
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32 on a GPU
    torch.manual_seed(cfg.seed)

    # batch_size rows a step = ranks * accumulation * micro_batch (the last micro-batch may be smaller)
    if cfg.batch_size % WORLD:
        die(f"batch_size={cfg.batch_size} is not a multiple of the {WORLD} ranks")
    per_rank = cfg.batch_size // WORLD
    micro = min(cfg.micro_batch, per_rank)

    if RANK:  # rank 0 goes first: what it refuses is said once, and ends the others here
        all_sum(torch.zeros(1))
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock = open(out / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            die(f"another run is writing to {out}; wait for it or choose another --out_dir")

    # data and model: from a checkpoint of this run, from pretrained weights, or new
    checkpoint = load_checkpoint(out / "ckpt.pt") if (out / "ckpt.pt").exists() else None
    start = load_checkpoint(Path(cfg.pretrained) / "ckpt.pt")["meta"] if cfg.pretrained and (
        Path(cfg.pretrained) / "ckpt.pt").exists() else None
    if cfg.pretrained:
        try:
            model = GPT.from_pretrained(cfg.pretrained).float()
        except (OSError, ValueError) as e:
            die(f"pretrained={cfg.pretrained}: {e}")
        cfg.block_size = min(cfg.block_size, model.config.block_size)
    train_rows, val_rows, meta = open_data(cfg)
    if start and start["fingerprint"] != meta["fingerprint"]:
        die(f"{cfg.pretrained} was trained with {start['tokenizer']}, data/{cfg.dataset} is in {meta['tokenizer']}: "
            "prepare the data with the model's tokenizer")
    if not cfg.pretrained:
        try:
            model = GPT(GPTConfig(cfg.block_size, 64 * math.ceil(meta["vocab_size"] / 64), cfg.n_layer, cfg.n_head,
                                  cfg.n_embd, cfg.n_hidden))
        except ValueError as e:
            die(e)
    tokens_a_step = cfg.batch_size * cfg.block_size
    max_iters = cfg.max_iters or math.ceil(train_rows.rows_in(cfg.epochs) / cfg.batch_size)
    shape = asdict(model.config)
    order = {k: getattr(cfg, k) for k in ("batch_size", "block_size", "seed", "optimizer", "dataset")}
    step, best, evaluated = 0, math.inf, -1
    if checkpoint:
        for what, was, now in (("model", checkpoint["config"], shape), ("data", checkpoint["meta"], meta),
                               ("run", checkpoint["order"], order)):
            changed = [f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in now if was.get(k) != now.get(k)]
            if changed:
                die(f"{out}/ckpt.pt is of another {what}: {'; '.join(changed)}; set it back or choose another --out_dir")
        model.load_state_dict(checkpoint["model"])
        step, best, evaluated = (checkpoint[k] for k in ("step", "best", "evaluated"))
        if step > max_iters or step == max_iters == evaluated:
            say(f"{out} is finished ({step:,} steps); delete it to train anew, or raise --max_iters")
        else:
            say(f"going on from {out}/ckpt.pt at step {step:,}")
    model = model.to(device)
    optimizers = make_optimizers(model, cfg, device)
    if checkpoint:
        for o, state in zip(optimizers, checkpoint["optimizers"]):
            o.load_state_dict(state)
    del checkpoint, start
    if RANK == 0:
        all_sum(torch.zeros(1))
    if step > max_iters or step == max_iters == evaluated:
        return
    raw = model
    if cfg.compile == "yes" or cfg.compile == "auto" and device.type == "cuda":
        model = torch.compile(model)
    if WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local] if device.type == "cuda" else None,
                                                          gradient_as_bucket_view=True)
    peak = next((v for k, v in PEAKS.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), 0) * 1e12
    flops = raw.flops_per_token(cfg.block_size)
    say(f"{raw.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens a row, {tokens_a_step:,} a step "
        f"({WORLD} x {math.ceil(per_rank / micro)} x {micro} rows), {max_iters:,} steps, {device}, {dtype}")
    if isinstance(train_rows, ExampleRows):
        n = train_rows.rows_in(1) / train_rows.epochs
        say(f"{len(train_rows.begin):,} examples, {len(train_rows.begin) / n:.1f} to a row, rows "
            f"{train_rows.length.sum() / (n * cfg.block_size):.1%} full, {train_rows.truncated:,} examples truncated")

    stop = []  # the signal that asks us to end: save first
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda n, frame: stop.append(n))

    log = None
    if RANK == 0:  # lines past the checkpoint, and half of one, are of steps that are done again
        lines = (out / "log.jsonl").read_text().splitlines(True) if step and (out / "log.jsonl").exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        (out / "log.tmp").write_text("".join(kept))
        os.replace(out / "log.tmp", out / "log.jsonl")
        log = open(out / "log.jsonl", "a", buffering=1)
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                die("--wandb needs: pip install wandb")
            wandb.init(project=cfg.wandb, name=out.name, config=vars(cfg), resume="allow")

    def record(**line):
        if RANK == 0:
            log.write(json.dumps(line) + "\n")
            if cfg.wandb:
                wandb.log(line, step=line["step"])

    def to_device(tensors):
        return [None if t is None else t.to(device, non_blocking=True) for t in tensors]

    # validation rows: the same at each evaluation, spread over all of val.bin, each rank taking its share
    val_n = val_rows.rows_in(1)
    picked = [i * val_n // min(val_n, cfg.eval_rows or val_n) for i in range(min(val_n, cfg.eval_rows or val_n))][RANK::WORLD]

    @torch.no_grad()
    def evaluate():
        """Mean loss over the targets of the picked rows."""
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of targets
        for at in range(0, len(picked), micro):
            tensors, n = batch_of(val_rows, picked[at:at + micro], device.type == "cuda", shuffle=False)
            with autocast:
                total += torch.tensor([raw(*to_device(tensors))[1].item() * n, n], dtype=torch.float64)
        all_sum(total)
        return (total[0] / total[1].clamp(min=1)).item()

    def save_last():
        state = {"config": shape, "model": raw.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step, "best": best, "evaluated": evaluated, "meta": meta, "order": order, "settings": {
                     k: list(v) if isinstance(v, tuple) else v for k, v in vars(cfg).items()}}
        if RANK == 0 and evaluated == step and val == best:  # first: killed between the two, a run saves both again
            save(out / "best.pt", {k: v for k, v in state.items() if k != "optimizers"})
        if RANK == 0:
            save(out / "ckpt.pt", state)

    val = math.nan  # the last evaluation of this process
    norms = []  # of the gradients of the steps since we last looked; the same on all ranks

    def look():
        """Wait for the device, and end the run at the first step whose gradient was not finite, before it is saved."""
        for at, norm in enumerate(torch.stack(norms).tolist() if norms else (), step - len(norms)):
            if not math.isfinite(norm):
                if RANK == 0:
                    die(f"loss or gradient not finite (norm {norm}) at step {at + 1:,}, rows {at * cfg.batch_size:,} to "
                        f"{(at + 1) * cfg.batch_size - 1:,} of the order; {out}/ckpt.pt is the last good state: lower the "
                        "learning rate or look at those rows")
                raise SystemExit(1)
        norms.clear()

    def read(step):
        """This rank's share of a step: rows step * batch_size + rank, + world, ... of the run's order."""
        numbers = range(step * cfg.batch_size + RANK, (step + 1) * cfg.batch_size, WORLD)
        return [batch_of(train_rows, numbers[at:at + micro], device.type == "cuda") for at in range(0, per_rank, micro)]

    reader = ThreadPoolExecutor(1)
    coming = reader.submit(read, step)
    begun = tick = time.time()
    ticked = first = step
    while True:
        if evaluated != step and (step % cfg.eval_interval == 0 or step == max_iters):
            look()
            val = evaluate()
            if not math.isfinite(val):
                die(f"validation loss {val} at step {step}; {out}/ckpt.pt is the last good state: lower the learning rate")
            say(f"step {step:,}: validation loss {val:.4f}")
            record(step=step, tokens=step * tokens_a_step, val_loss=val)
            best, evaluated = min(best, val), step
            if step:
                save_last()
            tick, ticked = time.time(), step
        if step == max_iters:
            break

        batches = coming.result()
        if step + 1 < max_iters:
            coming = reader.submit(read, step + 1)  # it is read while this one trains
        # over all ranks: the targets of this step, and who was asked to stop (one rank's signal is everyone's)
        count, asked = all_sum(torch.tensor([sum(n for _, n in batches), len(stop)])).tolist()
        if asked:
            look()
            save_last()
            all_sum(torch.zeros(1))  # a rank that has ended would have the others killed before they have saved
            say(f"asked to stop: saved {out}/ckpt.pt at step {step:,}; the same command goes on from there")
            if WORLD > 1:
                dist.destroy_process_group()
            raise SystemExit(128 + stop[0] if stop else 0)

        scale = lr_scale(step, max_iters, cfg)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * scale
        total = torch.zeros((), device=device)
        for i, (tensors, n) in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last or WORLD == 1 else model.no_sync():  # gradients travel once a step
                with autocast:
                    loss = model(*to_device(tensors))[1]
                # The mean is over all targets of the step, on whichever rank and micro-batch they lie; DDP averages over
                # ranks, `WORLD` makes it their sum.
                (loss * (n * WORLD / max(1, count))).backward()
            total += loss.detach() * (n / max(1, count))
        norms.append(torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf))
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1

        if step % cfg.log_interval == 0 or step in (1, max_iters):
            loss, norm = all_sum(total).item(), norms[-1].item()
            look()
            now = time.time()
            speed = (step - ticked) * tokens_a_step / (now - tick)
            mfu = speed * flops / (peak * WORLD) if peak else None
            left = timedelta(seconds=round((max_iters - step) * tokens_a_step / speed))
            say(f"step {step:>6,}/{max_iters:,} | loss {loss:.4f} | lr {cfg.learning_rate * scale:.1e} | norm {norm:.2f} | "
                f"{speed:,.0f} tok/s | " + (f"MFU {mfu:.1%} | " if mfu else "") + f"{left} left")
            record(step=step, tokens=step * tokens_a_step, loss=loss, lr=cfg.learning_rate * scale, norm=norm,
                   tokens_per_second=speed, mfu=mfu)
            tick, ticked = now, step

    say(f"train.py: {step - first:,} steps, {(step - first) * tokens_a_step / 1e6:.2f}M tokens in "
        f"{time.time() - begun:.1f} s; best validation loss {best:.4f}; {out}/ckpt.pt")
    if WORLD > 1:
        dist.destroy_process_group()


def plot(paths):
    """Draw training and validation loss over tokens of each log.jsonl into plot.png."""
    try:
        import matplotlib
    except ImportError:
        die("--plot needs: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not paths:
        die("--plot needs the logs to draw, as in: python train.py --plot out/log.jsonl")
    figure, axis = plt.subplots(figsize=(8, 5))
    for path in paths:
        try:
            lines = [json.loads(line) for line in open(path)]
        except (OSError, ValueError) as e:
            die(f"{path}: {e}")
        points = lambda key: ([x["tokens"] for x in lines if key in x], [x[key] for x in lines if key in x])
        curve, = axis.plot(*points("loss"), alpha=0.4)
        axis.plot(*points("val_loss"), marker="o", color=curve.get_color(), label=Path(path).parent.name or path)
    axis.set(xlabel="tokens", ylabel="loss (line: training, dots: validation)")
    axis.legend()
    figure.savefig("plot.png", dpi=120, bbox_inches="tight")
    print("plot.png")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        die("out of GPU memory: halve --micro_batch (it changes no result)")
    except OSError as e:  # a full disk
        die(f"{e}; the last checkpoint is whole")
    except RuntimeError as e:
        if WORLD == 1 or not any(what in str(e) for what in ("closed by peer", "reset by peer", "Broken pipe", "imed out")):
            raise
        die("another rank has ended or does not answer; the last checkpoint is whole, the same command goes on from there")
