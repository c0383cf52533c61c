"""TinyCodeLM-150M finetuned on LintSeq's edit sequences, from out-150m: prepare.py, lintseq.py,
prepare.py, train.py, evaluate.py, each with this file (`make 150m` does it all)."""
instruct = ("magicoder", "starcoder2")  # 88,900 Python pairs in the paper
source = "data/instruct.jsonl"
dest = "data/edits.jsonl"
samples = 5  # edit sequences a pair
form = "edits"
dataset = "finetune-edits"
tokenizer = "p50k_base"
max_tokens = 1_000_000  # nothing is left out: train.py truncates to block_size, as the paper does

pretrained = "out-150m"
out_dir = "out-150m-edits"
block_size = 1024

# The paper: 512 padded sequences a step, 88,900 pairs * 5 * 2 epochs / 512 = 1,736 steps. Here they
# are packed, about two to a row of 1024 tokens (train.py prints how many), so 256 rows hold as
# many, and `epochs` counts the steps.
batch_size = 256
micro_batch = 32
epochs = 2
learning_rate = 3e-4
decay = "linear"
min_lr_ratio = 0.0
warmup_iters = 2  # a warm-up ratio of 0.001
weight_decay = 0.01
eval_interval = 200

benchmark = "humaneval"
num_samples = 10
temperatures = (1.0,)
top_p = 0.95
max_new_tokens = 512
