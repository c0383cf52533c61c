"""TinyCodeLM-400M, pretrained as in the paper:
torchrun --nproc_per_node=4 train.py config/400m.py"""
dataset = "pretrain"  # the same bins as config/150m.py's
corpora = ("fineweb", "the-stack")
tokenizer = "p50k_base"
val_fraction = 0.0005

out_dir = "out-400m"
block_size = 1024
n_layer, n_head, n_embd = 24, 16, 1024  # 454,164,480 parameters

# 1024 rows * 1024 tokens = 1,048,576 tokens a step = 4 GPUs * 16 accumulated * 16 rows * 1024
batch_size = 1024
micro_batch = 16
max_iters = 68_665  # 72e9 tokens / 1,048,576 a step
learning_rate = 6e-4
warmup_iters = 2000
weight_decay = 0.1
beta1, beta2, grad_clip = 0.9, 0.95, 1.0
eval_interval = 500
