"""The demo's finetuning on LintSeq's edit sequences, from the pretrained demo model."""
from config.demo import *

corpora = instruct = ()
form = "edits"
dataset = "demo-edits"
pretrained = "out-demo"
out_dir = "out-demo-edits"

epochs = 1  # over 2 edit sequences a pair
max_iters = 0
decay, min_lr = "linear", 0.0  # as the paper finetunes
eval_interval = 400
