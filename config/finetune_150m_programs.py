"""The paper's baseline: whole programs in place of edit sequences; 10 epochs over 1 text a pair are
as many passes."""
from config.finetune_150m import *
form, dataset, out_dir, epochs = "programs", "finetune-programs", "out-150m-programs", 10
