"""The demo's baseline: whole programs in place of edits, as many passes over the instructions."""
from config.demo_edits import *
form, dataset, out_dir, epochs = "programs", "demo-programs", "out-demo-programs", 3
