"""What training and decoding on a CPU keep of their speed beside one busy process.

    python tests/bench/beside.py      # 8 minutes on two cores

At the demo's size, a process for each way: what config does (a thread less beside a busy process),
GNU OpenMP's default (its threads spin for milliseconds while they wait for each other), passive
(they sleep at once), and one thread. They take turns of some seconds, six rounds; first on the
quiet machine, then beside a process that does nothing but count. Everything else should be still.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"config's": {}, "the default": {},
        "passive": {"OMP_WAIT_POLICY": "passive"}, "one thread": {"OMP_NUM_THREADS": "1"}}
TURN = 4  # seconds, of which the second half counts
TOKENS = {"training": 8 * 256, "decoding": 8 * 32}


def work():
    """Make a step of what each line on standard input names; say how long it took."""
    sys.path.insert(0, str(ROOT))
    import config
    import torch
    from common import timed_step
    from model import GPT, GPTConfig
    from train import keep_freed_memory
    keep_freed_memory()
    model = GPT(GPTConfig(256, 1024, 4, 8, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randint(1024, (2, 8, 256))
    prompts = x[:, :64].tolist()
    for line in sys.stdin:
        if sys.argv[2] == "config's":
            config.adapt_threads()
        start = time.perf_counter()
        if line == "training\n":
            timed_step(lambda: model(x, y)[1], model, optimizer, x.device, torch.float32)
        else:
            model.generate(prompts, 32, temperature=0)
        print(time.perf_counter() - start, flush=True)


def measure(workers, what, rounds):
    """{way: tokens a second}, from the median step of all turns' second halves."""
    times = {way: [] for way in workers}
    for _ in range(rounds):
        for way, worker in workers.items():
            took = []
            while sum(took) < TURN:
                worker.stdin.write(what + "\n")
                worker.stdin.flush()
                took.append(float(worker.stdout.readline()))
            times[way] += [t for n, t in enumerate(took) if sum(took[:n + 1]) > TURN / 2]
    return {way: TOKENS[what] / statistics.median(t) for way, t in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    workers = {way: subprocess.Popen(
        [sys.executable, __file__, "--work", way], env=clean | env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True) for way, env in WAYS.items()}
    quiet = {what: measure(workers, what, rounds) for what in TOKENS}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = {what: measure(workers, what, rounds) for what in TOKENS}
    finally:
        busy.kill()
        for worker in workers.values():
            worker.kill()
    from common import machine
    on = machine("float32")
    print(f"{os.cpu_count()} cores of {on['device']}, torch {on['torch']}, commit {on['commit']}; "
          "tokens a second at the demo's size")
    for what in TOKENS:
        best = quiet[what]["the default"]
        for way in WAYS:
            print(f"{what}  {way:12}  quiet {quiet[what][way]:7,.0f} "
                  f"({quiet[what][way] / best:4.0%} of the default's)  beside a busy process "
                  f"{beside[what][way]:7,.0f} ({beside[what][way] / best:4.0%})")


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
