import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def start(script, *args, cwd, ranks=1, **kwargs):
    """A script as a user starts it, in the folder `cwd`; with ranks > 1 under torchrun. The Popen object."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(launcher + [str(ROOT / script), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(script, *args, cwd, ranks=1):
    """(exit status, standard output, standard error) of a script."""
    process = start(script, *args, cwd=cwd, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with small real data: data/text from some standard library files, data/edits and data/programs from 60
    problems of the family, one tokenizer."""
    import inspect
    import argparse, ast, base64, calendar, csv, difflib, heapq, shlex, string, textwrap
    from prepare import family_compositions, family_problem
    import random
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "text").mkdir()
    for module in (argparse, ast, base64, calendar, csv, difflib, heapq, shlex, string, textwrap):
        (folder / "text" / f"{module.__name__}.py").write_text(inspect.getsource(module))
    compositions = random.Random(0).sample(family_compositions(), 60)
    rows = [family_problem(c, random.Random(i)) for i, c in enumerate(compositions)]
    (folder / "problems.jsonl").write_text("".join(json.dumps({**r, "task_id": f"t/{i}"}) + "\n" for i, r in enumerate(rows)))
    (folder / "instruct.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ("--tokenizer=tiny.tiktoken", "--bpe_size=510", "--val_fraction=0.2",
              "--source=instruct.jsonl", "--dest=edits.jsonl")
    for script, *args in (("prepare.py", "--dataset=text", "--corpora=text", *common),
                          ("lintseq.py", "--source=instruct.jsonl", "--dest=edits.jsonl", "--samples=2"),
                          ("prepare.py", "--dataset=edits", "--form=edits", *common),
                          ("prepare.py", "--dataset=programs", "--form=programs", *common)):
        status, out, err = run(script, *args, cwd=folder)
        assert status == 0, (script, out, err)
    return folder
