"""What `make 150m GPUS=4` does first: it says what the whole run takes, and refuses in one line
where something is missing.

    python -m config._preflight 150m 4
"""
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import config

TOKENS = 72e9  # two epochs over 36 billion (arXiv 2410.02749)
SPEED = {"150m": 104_000, "400m": 35_000}  # tokens/s of one H100, the paper's rate
DATA = 200e9  # bytes under data/: tokens (72 GB, twice while they are joined), checkpoints
HUB = 120e9  # bytes under HF_HOME: both corpora as Parquet


def main():
    name, gpus = sys.argv[1:]
    sys.argv[0] = f"make {name}"
    if not gpus.isdecimal() or int(gpus) < 1:
        config.die(f"GPUS={gpus!r} is no number of GPUs", 2)
    gpus = int(gpus)
    settings = importlib.import_module(f"config.{name}")
    there = sum(f.stat().st_size for f in Path("data").rglob("*") if f.is_file())
    free = shutil.disk_usage("data" if Path("data").exists() else ".").free
    hours = TOKENS / (gpus * SPEED[name]) / 3600
    print(f"make {name} GPUS={gpus}: prepare, pretrain, edits, finetune twice, evaluate, export\n"
          f"  each step goes on where it stopped; `make -n {name} GPUS={gpus}` shows them\n"
          f"  disk: about {DATA / 1e9:.0f} GB under data/ ({there / 1e9:.1f} GB there, "
          f"{free / 1e9:.0f} GB free), {HUB / 1e9:.0f} GB of downloads under HF_HOME\n"
          f"  time: about {hours:.0f} hours of pretraining at the paper's {SPEED[name]:,} tokens/s "
          "a GPU;\n"
          "        tokenizing is about 4 core-hours, finetuning a few hours")
    if settings.batch_size % gpus:
        config.die(f"GPUS={gpus} does not divide the batch of {settings.batch_size} rows: take a "
                   "number that does")
    packages = ("pyarrow", "safetensors", "huggingface_hub")
    missing = [p for p in packages if not importlib.util.find_spec(p)]
    if missing:
        config.die(f"missing: pip install {' '.join(missing)}")
    import torch
    if torch.cuda.device_count() < gpus:
        config.die(f"this machine has {torch.cuda.device_count()} CUDA GPUs, not {gpus}: say how "
                   "many with GPUS=, or try `make demo`, which needs none")
    import huggingface_hub
    if not huggingface_hub.get_token() and not Path("data/pretrain/meta.json").is_file():
        config.die("no Hugging Face token: accept the terms on https://huggingface.co/datasets/"
                   "bigcode/the-stack and set HF_TOKEN to a token of that account")
    if free + there < DATA:
        config.die(f"about {(DATA - there - free) / 1e9:.0f} GB of disk are missing: make room, or "
                   "make data/ a link to a larger disk")


if __name__ == "__main__":
    config.run(main)
