"""Training throughput of model.py against transformers' OLMo: same shape, batch and precision.

    python tests/bench/train.py                          # a CPU: 150M and the demo's size, float32
    python tests/bench/train.py --dtype=bfloat16         # the same on a CPU with AVX512-BF16 or AMX
    python tests/bench/train.py --shapes=150m,400m       # a GPU: bf16, every variant, 50 steps each

A step is what a run does: forward, backward, clipping, AdamW. The peer is at its best: SDPA, fused
AdamW, and torch.compile (on a CPU, if it has g++), the better of with and without. Each has a
process of its own; they compile side by side and then take turns, on a CPU step by step, so that
whatever else the machine does hits all of them. On a CPU ours keeps freed memory as train.py does
(`keep_freed_memory`), and rows apart show ours without it and the peer with it; on a GPU rows apart
show attention by flash (SDPA's own choice on Hopper is cuDNN's) and the residual stream in bfloat16
in place of float32. A large matmul is the floor, and a profile says where the time goes by kinds of
kernels. Prints a table, which --out=FILE keeps (under results/).
"""
import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch

from common import ROOT, machine, timed_step

sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig  # noqa: E402
from train import keep_freed_memory  # noqa: E402

# layers, heads, width, vocabulary, batch, length (the last two on a CPU; else --batch x 1024)
SHAPES = {
    "150m": (12, 12, 768, 50304, 4, 512),
    "400m": (24, 16, 1024, 50304, 2, 512),
    "demo": (4, 8, 128, 1024, 8, 256),
}


def ours(shape, device, what):
    layers, heads, width, vocab, _, length = shape
    model = GPT(GPTConfig(max(length, 256), vocab, layers, heads, width)).to(device)
    if "bfloat16 stream" in what:
        model.wte.register_forward_hook(lambda module, args, x: x.bfloat16())
    return model, lambda m, x, y: m(x, y)[1]


def theirs(shape, device):
    from transformers import OlmoConfig, OlmoForCausalLM
    layers, heads, width, vocab, _, length = shape
    model = OlmoForCausalLM(OlmoConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=max(length, 256),
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa"))
    # shifted outside, by the same targets as ours, so that both predict as many tokens
    return model.to(device), lambda m, x, y: m(input_ids=x, labels=y, shift_labels=y).loss


class Runner:
    """A model, its optimizer and its batch; `what` says which and how."""

    def __init__(self, what, shape, device, dtype):
        made = ours(shape, device, what) if what.startswith("ours") else theirs(shape, device)
        (self.model, self.loss), self.device, self.dtype = made, device, dtype
        self.call = torch.compile(self.model) if "compiled" in what else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=True)
        x = torch.randint(shape[3], (shape[4], shape[5] + 1), device=device)
        self.batch = x[:, :-1].contiguous(), x[:, 1:].contiguous()
        self.flash = "flash" in what

    def step(self):
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
        kernel = torch.nn.attention.sdpa_kernel(flash) if self.flash else nullcontext()
        return timed_step(lambda: self.loss(self.call, *self.batch), self.model, self.optimizer,
                          self.device, self.dtype, kernel)

    def warm_up(self):
        """Three steps; on a GPU others do theirs at the same time and may hold the memory."""
        for _ in range(60):
            try:
                return [self.step() for _ in range(3)]
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                time.sleep(2)


def work(pipe, what, shape, device, dtype):
    """A process that makes as many steps as it is asked for and says how long each took; at the end
    (0), the GiB that it held at most and what it spent its time on."""
    torch.set_float32_matmul_precision("high")
    # ours has it unless its name says "plain memory", the peer where its name says "our memory"
    if device.type == "cpu" and what.startswith("ours") != ("memory" in what):
        keep_freed_memory()
    runner = Runner(what, shape, device, dtype)
    runner.warm_up()
    cuda, shares = device.type == "cuda", {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    while True:
        if cuda:
            torch.cuda.empty_cache()  # the others' turn
        pipe.send("ready")
        steps = pipe.recv()
        if not steps:
            break
        pipe.send([runner.step() for _ in range(steps)])
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else 0
    if "flash" not in what and "stream" not in what:
        shares = kernels(runner)
    pipe.send((peak, shares))


def take_turns(shape, steps, device, dtype):
    """{what: (seconds a step, the median; GiB at most; its kernels)}. On a CPU two at once: each
    takes up to 8 GB at 150M."""
    spawn, measured = multiprocessing.get_context("spawn"), {}
    groups = [["ours", "transformers"], ["ours, plain memory", "transformers, our memory"]]
    groups += [["ours, compiled", "transformers, compiled"]] * bool(shutil.which("g++"))
    if device.type == "cuda":
        groups = [["ours, compiled", "ours, compiled, flash", "ours, compiled, bfloat16 stream",
                   "transformers, compiled", "transformers"]]
    for names in groups:
        pipes, times = {}, {name: [] for name in names}
        for name in names:
            pipes[name], other = spawn.Pipe()
            spawn.Process(target=work, args=(other, name, shape, device, dtype),
                          daemon=True).start()
            other.close()
        for name in names:
            try:
                pipes[name].recv()
            except EOFError:  # it has said why
                del pipes[name]
        turn = max(1, steps // 2) if device.type == "cuda" else 1
        for _ in range(steps // turn):
            for name, pipe in pipes.items():
                pipe.send(turn)
                times[name] += pipe.recv()
                pipe.recv()
        for name, pipe in pipes.items():
            pipe.send(0)
            measured[name] = statistics.median(times[name]), *pipe.recv()
    return measured


KINDS = {"attention": ("attention", "flash", "fmha", "sdpa"),
         "matrix products": ("gemm", "mm", "cutlass", "nvjet", "xmma", "cublas"),
         "optimizer and clipping": ("adam", "multi_tensor", "lpnorm", "vector_norm", "foreach"),
         "compiled passes": ("triton",),
         "copies and zeros": ("copy", "memcpy", "memset", "cat", "fill", "zero")}


def kernels(runner):
    """{kind: share of the time of a step's kernels}; of operators on a CPU."""
    cuda = runner.device.type == "cuda"
    with torch.profiler.profile() as profile:
        for _ in range(3):
            runner.step()
    times = Counter()
    for e in profile.key_averages():
        if (e.device_type == torch.autograd.DeviceType.CUDA) == cuda:
            kind = next((k for k, words in KINDS.items()
                         if any(w in e.key.lower() for w in words)), "other")
            times[kind] += e.self_device_time_total if cuda else e.self_cpu_time_total
    return {kind: round(t / times.total(), 3) for kind, t in times.most_common()}


def floor(device, dtype):
    """TFLOP/s of a large matmul in the precision of training."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best / 1e12


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="")
    parser.add_argument("--steps", type=int, default=0,
                        help="timed steps of each; 0: 50 on a GPU, 4 on a CPU (20: demo)")
    parser.add_argument("--batch", default="32", help="rows of 1,024 on a GPU; 16,32: both")
    parser.add_argument("--dtype", default="",
                        help="float32 or bfloat16 (autocast); a GPU takes bfloat16, a CPU float32")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    torch.set_float32_matmul_precision("high")
    peak = floor(device, dtype)
    result = machine(dtype) | {"matmul TFLOP/s": round(peak, 3)}
    print(f"{result['device']}, torch {torch.__version__}, {dtype}, a large matmul: {peak:.2f} "
          "TFLOP/s")
    for name in (args.shapes or ("150m" if cuda else "demo,150m")).split(","):
        base = SHAPES[name]
        for batch in map(int, args.batch.split(",")) if cuda else [base[4]]:
            shape = (*base[:4], batch, 1024 if cuda else base[5])
            steps = args.steps or (50 if cuda else 20 if name == "demo" else 4)
            measured = take_turns(shape, steps, device, dtype)
            tokens = shape[4] * shape[5]
            flops = ours(shape, "cpu", "")[0].flops_per_token(shape[5])
            best = min((v[0] for k, v in measured.items() if k.startswith("transformers")
                        and "memory" not in k), default=math.nan)
            for what, (s, memory, shares) in measured.items():
                row = {"shape": name, "batch": shape[4], "length": shape[5], "what": what,
                       "tokens/s": round(tokens / s, 1), "ratio": round(best / s, 2),
                       "of the matmul": round(tokens / s * flops / peak / 1e12, 3)}
                if cuda:
                    row |= {"MFU of 989": round(tokens / s * flops / 989e12, 3),
                            "GiB": round(memory, 1)}
                if shares:
                    row["time of kernels"] = shares
                result["rows"].append(row)
                print(f"{name:5} {shape[4]:3} x {shape[5]}  {what:32} {tokens / s:12,.0f} tok/s  "
                      f"{row['of the matmul']:6.1%} of the matmul  {row['ratio']:.2f} x "
                      "transformers" + f"  {memory:.1f} GiB" * cuda, flush=True)
                if shares:
                    print("      its kernels: " + ", ".join(
                        f"{kind} {v:.1%}" for kind, v in shares.items()), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
