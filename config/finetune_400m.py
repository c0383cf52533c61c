"""TinyCodeLM-400M finetuned on LintSeq's edit sequences: the 150M's recipe from another start."""
from config.finetune_150m import *
pretrained, out_dir, micro_batch = "out-400m", "out-400m-edits", 16
