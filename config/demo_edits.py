"""The demo's finetuning on LintSeq's edit sequences."""
from config.demo import *

corpora = instruct = ()
form = "edits"
dataset = "demo-edits"
# no `pretrained`: from the pretrained demo model it ends worse at this size (README)
out_dir = "out-demo-edits"

epochs = 1  # over 3 edit sequences a pair
max_iters = 0
decay, min_lr_ratio = "linear", 0.0  # as the paper finetunes
eval_interval = 400
