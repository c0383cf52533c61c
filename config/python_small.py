"""Optimizers compared at a size for two CPU cores: 1.3M parameters on this machine's Python.

    python prepare.py config/python_small.py
    python train.py config/python_small.py
    python train.py config/python_small.py --optimizer=muon --out_dir=out-python-muon
    python train.py --plot=loss.png out-python/log.jsonl out-python-muon/log.jsonl
"""
import sysconfig as _sysconfig
dataset = "python"
corpora = ("stdlib", _sysconfig.get_paths()["purelib"])  # and what pip has installed
tokenizer = "data/python.tiktoken"
bpe_size = 2046
val_fraction = 0.005

out_dir = "out-python"
block_size = 256
n_layer, n_head, n_embd = 4, 4, 128

# 16 rows * 256 tokens * 500 steps = 2.05 million tokens
batch_size = micro_batch = 16
max_iters = 500
learning_rate = 3e-3  # the best of 1e-3, 3e-3, 1e-2 at 150 steps (validation loss 5.22, 4.90, 5.81)
muon_lr = 0.02  # the best of 0.01, 0.02, 0.05 at 150 steps (4.57, 4.55, 4.59)
warmup_iters = 50
weight_decay = 0.01
eval_interval = 25
eval_rows = 128
log_interval = 5
