"""The demo: a model of 1.2M parameters, trained on this Python's own standard library (README)."""
# what prepare.py makes
dataset = "demo"
corpora = ("stdlib",)
tokenizer = "data/demo.tiktoken"
bpe_size = 1022  # and two special tokens: 1024 = 16 * 64 rows
instruct = ("stdlib", "family")
source = "data/demo-instruct.jsonl"
dest = "data/demo-edits.jsonl"
benchmark = "data/demo-problems.jsonl"
family_size = 8000
samples = 3  # edit sequences a program

# the model
out_dir = "out-demo"
block_size = 256
n_layer, n_head, n_embd = 4, 8, 128  # more heads, fewer lines miscounted

# 8 rows * 256 tokens = 2,048 tokens a step: from 4,096, in half as many steps, it learns less
batch_size = micro_batch = 8
max_iters = 100
optimizer = "muon"
learning_rate = 3e-3
muon_lr = 0.01
warmup_iters = 20
weight_decay = 0.01
eval_interval = 50
eval_rows = 128
log_interval = 50

# the scores
temperatures = (0.0, 1.0)
num_samples = 5
ks = (1, 5)
max_new_tokens = 192
decode_batch = 256
results = "out-demo-eval"
