"""TinyCodeLM-150M, pretrained as in the paper (`make 150m GPUS=4` does it all)."""
dataset = "pretrain"
# The paper's mixture is the two corpora, each whole, for two epochs: FineWeb's 10BT sample is 10
# billion tokens (of GPT-2's tokenizer), which leaves about 26 of the 36 billion for The Stack's
# Python: 28% text, 72% code. prepare.py prints how many tokens it makes; should they be more than
# 36 billion, "the-stack:100" takes the first 100 files only.
corpora = ("fineweb", "the-stack")
tokenizer = "p50k_base"  # GPT-2's and runs of spaces; 50281 entries and <|diff|> fit 50304 rows
val_fraction = 0.0005  # 36e9 * 0.0005 = 18 million tokens

out_dir = "out-150m"
block_size = 1024
n_layer, n_head, n_embd = 12, 12, 768  # 151,879,680 parameters

# 1024 rows * 1024 tokens = 1,048,576 tokens a step = 4 GPUs * 8 accumulated * 32 rows * 1024
batch_size = 1024
micro_batch = 32
# 72e9 tokens (two epochs over 36e9) / 1,048,576 a step = 68,665 steps
max_iters = 68_665
learning_rate = 6e-4  # OLMo's tiny configurations; the paper does not say
warmup_iters = 2000
weight_decay = 0.1
beta1, beta2, grad_clip = 0.9, 0.95, 1.0
eval_interval = 500  # steps; half a billion tokens
