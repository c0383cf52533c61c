"""TinyCodeLM-150M with Muon on the matrices of its blocks and AdamW on the embedding: the same data
and steps, for fewer tokens to the same loss (README: measured at a small size)."""
from importlib import import_module as _import
globals().update({k: v for k, v in vars(_import("config.150m")).items() if not k.startswith("_")})

out_dir = "out-150m-muon"
optimizer = "muon"
muon_lr = 0.02  # learning_rate stays for the embedding
