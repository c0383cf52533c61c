"""What `make demo` and `make 150m GPUS=4` do first: say what the whole run takes, and refuse in one
line where something is missing, not after hours of training.

    python -m config._preflight demo 1
    python -m config._preflight 150m 4
"""
import importlib
import shutil
import sys
from pathlib import Path

import config
import evaluate
import prepare

TOKENS = 72e9  # two epochs over 36 billion (arXiv 2410.02749)
# tokens/s of a GPU: an H200's (tests/bench/results/train-h200.json), the paper's H100's
SPEED = {"150m": 433_000, "400m": 35_000}
DATA = 200e9  # bytes under data/: tokens (72 GB), twice while they are joined, and room to spare
HUB = 120e9  # bytes under HF_HOME: both corpora as Parquet


def bytes_under(folder):
    """Of all files; a link, of which the hub's cache has one to each file, counts as a link."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def check_sandbox(unsafe):
    """die where evaluate.py could not run a model's programs."""
    try:
        evaluate.run_program("pass", unsafe=unsafe)
    except RuntimeError as e:
        config.die(f"{e}, as in {sys.argv[0]} UNSAFE=--unsafe")


def main():
    name, gpus, *unsafe = sys.argv[1:]
    sys.argv[0] = f"make {name}"
    if unsafe not in ([], ["--unsafe"]):
        config.die(f"UNSAFE={' '.join(unsafe)}: write UNSAFE=--unsafe, or leave it out", 2)
    check_sandbox(bool(unsafe))
    if name == "demo":
        return
    if not gpus.isdecimal() or int(gpus) < 1:
        config.die(f"GPUS={gpus!r} is no number of GPUs", 2)
    gpus = int(gpus)
    import torch
    from huggingface_hub import constants, get_token
    settings = importlib.import_module(f"config.{name}")
    hours = TOKENS / (gpus * SPEED[name]) / 3600
    print(f"make {name} GPUS={gpus}: prepare, pretrain, edits, finetune twice, evaluate, export\n"
          f"  each step goes on where it stopped; `make -n {name} GPUS={gpus}` shows them\n"
          f"  disk: about {DATA / 1e9:.0f} GB under data/, {HUB / 1e9:.0f} GB of downloads under "
          "HF_HOME\n"
          f"  time: about {hours:.0f} hours of pretraining at {SPEED[name]:,} tokens/s a GPU;\n"
          "        tokenizing is about 4 core-hours, finetuning a few hours")
    if settings.batch_size % gpus:
        config.die(f"GPUS={gpus} does not divide the batch of {settings.batch_size} rows: take a "
                   "number that does")
    if torch.cuda.device_count() < gpus:
        config.die(f"this machine has {torch.cuda.device_count()} CUDA GPUs, not {gpus}: say how "
                   "many with GPUS=, or try `make demo`, which needs none")
    if Path("data/pretrain/meta.json").is_file():
        return  # the corpora are tokens already
    if not get_token():
        config.die("no Hugging Face token: accept the terms on https://huggingface.co/datasets/"
                   "bigcode/the-stack and set HF_TOKEN to a token of that account")
    data, hub = Path("data"), Path(constants.HF_HUB_CACHE)
    cached = [hub / f"datasets--{prepare.HUB[corpus][0].replace('/', '--')}"
              for corpus in ("fineweb", "the-stack")]
    still_free = {}  # number of a file system: its free bytes, less what is to be written there
    for folder, parts, wanted in ((data, [data / settings.dataset], DATA), (hub, cached, HUB)):
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder.stat().st_dev
        still_free.setdefault(disk, shutil.disk_usage(folder).free)
        still_free[disk] -= max(0, wanted - sum(map(bytes_under, parts)))
        if still_free[disk] < 0:
            config.die(f"about {-still_free[disk] / 1e9:.0f} GB of disk are missing for {folder}: "
                       "make room, or make it a link to a larger disk")


if __name__ == "__main__":
    config.run(main)
