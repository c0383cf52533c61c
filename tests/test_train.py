"""train.py as users run it: to the end, stopped and resumed, killed, on two ranks, with bad input;
its rows, schedule and Muon."""
import importlib.util
import json
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, log_lines, run, start

import train

TINY = ("--block_size=64", "--n_layer=2", "--n_head=2", "--n_embd=32", "--batch_size=8",
        "--micro_batch=8", "--warmup_iters=2", "--learning_rate=3e-3", "--eval_rows=16",
        "--eval_interval=10", "--log_interval=1")
LONGER = (*TINY, "--block_size=256")  # room for whole examples


def losses(folder):
    return [(x["step"], x.get("loss"), x.get("val_loss")) for x in log_lines(folder)]


def load(path):
    return torch.load(path, weights_only=True)


def refused(*args, cwd, says):
    """The command ends with one line, which holds `says`, before it trains. The line."""
    status, _, line = call("train.py", *args, cwd=cwd)
    assert status in (1, 2) and len(line.splitlines()) == 1 and says in line, line
    return line


def diverges(*args, cwd):
    """The run ends with one line that says what to do about it. The line."""
    status, out, err = call("train.py", *args, cwd=cwd)
    assert status == 1 and len(err.splitlines()) == 1 and "is not finite" in err, (status, out, err)
    assert "lower --learning_rate" in err
    return err


def same_state(a, b):
    a, b = (load(f / "ckpt.pt") for f in (a, b))
    assert a["step"] == b["step"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    flat = lambda c: [v for o in c["optimizers"] for s in o["state"].values() for v in s.values()]
    assert len(flat(a)) > 0 and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b)))


FAULTY = """
import io, os, resource, runpy, sys
import torch
sys.path.insert(0, {root!r})
real = torch.save
def save(state, f):
    if state["step"] == {step} and "optimizers" in state:
        if {what!r} == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        else:
            whole = io.BytesIO()
            real(state, whole)
            f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            f.flush()
            os.kill(os.getpid(), 9)
    real(state, f)
torch.save = save
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def faulty(folder, what, step):
    """A train.py that is killed while it writes a step's checkpoint, or finds the disk full."""
    (folder / "faulty.py").write_text(FAULTY.format(root=str(ROOT), what=what, step=step))
    return folder / "faulty.py"


def stop_at(step, number, *args, **kwargs):
    """Signal a run when it has said this step's line; (exit status, the rest of its output)."""
    process = start("train.py", *args, **kwargs)
    for line in process.stdout:
        if line.startswith(f"step {step:6}/"):
            process.send_signal(number)
            break
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learns_and_resumes_bit_for_bit(workspace, tmp_path, optimizer):
    args = ("--dataset=text", f"--optimizer={optimizer}", "--max_iters=30", *TINY)
    begun = time.monotonic()
    status, out, err = run("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace)
    took = time.monotonic() - begun
    assert status == 0, err
    whole = losses(tmp_path / "whole")
    assert whole[-1][2] < whole[0][2] - 0.5  # validation loss fell
    steps = [x for x in log_lines(tmp_path / "whole") if "loss" in x]
    assert steps[0]["step"] == 1
    assert all(0 < x["tokens"] / x["step"] / x["tokens_per_second"] < took for x in steps)
    assert all(len(line) <= 120 for line in out.splitlines() if line.startswith("step"))
    args = (*args, f"--out_dir={tmp_path}/cut")
    if optimizer == "adamw":  # killed three steps past a checkpoint, in the middle of a line
        stop_at(13, signal.SIGKILL, *args, cwd=workspace)
        with open(tmp_path / "cut/log.jsonl", "a") as f:
            f.write('{"step": 14, "lo')
        status, out, err = run(faulty(tmp_path, "full disk", 20), *args, cwd=workspace)
        assert status == 1 and "cannot write" in err and len(err.splitlines()) == 1, err
        assert not list((tmp_path / "cut").glob("*.tmp"))
    else:
        assert run(faulty(tmp_path, "kill", 20), *args, cwd=workspace)[0] == -signal.SIGKILL
        assert (tmp_path / "cut/ckpt.tmp").exists()
    status, out, err = run("train.py", *args, cwd=workspace)
    assert status == 0 and "going on from" in out and "at step 10" in out, err
    assert losses(tmp_path / "cut") == whole
    same_state(tmp_path / "cut", tmp_path / "whole")
    best = load(tmp_path / "cut/best.pt")
    assert best["best"] == min(x[2] for x in whole[1:] if x[2] is not None)
    status, out, err = call("train.py", *args, cwd=workspace)
    assert status == 0 and "is finished (30 steps)" in out


def test_two_ranks_killed_and_stopped_resume_bit_for_bit(workspace, tmp_path):
    """Rank 0 dies in the middle of a save: the other ends too; then torchrun is asked to stop just
    where an evaluation is due; the third run ends as one that was never stopped."""
    args = ("--dataset=edits", "--max_iters=12", *LONGER, "--eval_interval=4")
    assert run("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace, ranks=2)[0] == 0
    args = (*args, f"--out_dir={tmp_path}/cut")
    status, out, err = run(faulty(tmp_path, "kill", 8), *args, cwd=workspace, ranks=2)
    assert status == 1 and "rank 1: another rank has ended" in err and "SIGKILL" in err, err
    assert load(tmp_path / "cut/ckpt.pt")["step"] == 4
    status, out = stop_at(8, signal.SIGTERM, *args, cwd=workspace, ranks=2)
    assert status != 0 and "asked to stop: saved" in out
    assert load(tmp_path / "cut/ckpt.pt")["step"] < 12
    status, out, err = run("train.py", *args, cwd=workspace, ranks=2)
    assert status == 0 and "going on from" in out, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    same_state(tmp_path / "cut", tmp_path / "whole")


def test_sigterm_saves_and_two_ranks_go_on(workspace, tmp_path):
    """One rank, asked to stop in the middle; two finish the run; the losses are those of one."""
    args = ("--dataset=edits", "--max_iters=12", *LONGER)
    assert call("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace)[0] == 0
    args = (*args, f"--out_dir={tmp_path}/cut")
    status, out = stop_at(3, signal.SIGTERM, *args, cwd=workspace)
    assert "asked to stop: saved" in out and status == 128 + signal.SIGTERM
    status, out, err = run("train.py", *args, cwd=workspace, ranks=2)
    assert status == 0 and "going on from" in out and "(2 x 1 x 4 rows)" in out, err
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert [x[0] for x in one] == [x[0] for x in two]
    for a, b in zip(one, two):
        assert all(abs(x - y) < 2e-4 for x, y in zip(a[1:], b[1:]) if x is not None)


def test_accumulation_does_not_change_the_losses(workspace, tmp_path):
    for micro in (8, 3):
        args = ("--dataset=edits", "--max_iters=5", *LONGER, f"--micro_batch={micro}")
        assert call("train.py", *args, f"--out_dir={tmp_path}/{micro}", cwd=workspace)[0] == 0
    for a, b in zip(losses(tmp_path / "8"), losses(tmp_path / "3")):
        assert all(abs(x - y) < 1e-4 for x, y in zip(a[1:], b[1:]) if x is not None)


def test_finetunes_from_pretrained_and_refuses_what_does_not_fit(workspace, tmp_path):
    pre, out_dir = f"{tmp_path}/pre", f"--out_dir={tmp_path}/tuned"
    args = ("--dataset=text", "--max_iters=10", *LONGER, f"--out_dir={pre}")
    assert call("train.py", *args, cwd=workspace)[0] == 0
    tune = ("--dataset=programs", "--epochs=2", *LONGER, f"--pretrained={pre}")
    status, out, err = call("train.py", *tune, out_dir, "--max_iters=2", cwd=workspace)
    assert status == 0, err
    new = (*tune, "--pretrained=", f"--out_dir={tmp_path}/new", "--max_iters=1")
    assert call("train.py", *new, cwd=workspace)[0] == 0
    first, untrained = (losses(tmp_path / x)[0][2] for x in ("tuned", "new"))  # before any step
    assert first < untrained - 0.1
    (tmp_path / "pre").rename(tmp_path / "gone")  # to go on needs it no more
    status, out, err = call("train.py", *tune, out_dir, "--max_iters=3", cwd=workspace)
    assert status == 0 and "at step 2 (" in out, err
    (tmp_path / "gone").rename(tmp_path / "pre")
    for change, message in (
            (("--batch_size=4",), "batch_size was 8, is 4"),
            (("--dataset=edits",), "dataset was 'programs', is 'edits'"),
            (("--pretrained=", "--n_layer=3"), "n_layer was 2, is 3"),
            (("--seed=1",), "seed was 1337, is 1"),
            (("--pretrained=", "--n_head=3"), "n_embd=32 must be n_head=3 times"),
            (("--pretrained=nowhere", f"--out_dir={tmp_path}/x"), "nowhere")):
        refused(*tune, out_dir, *change, cwd=workspace, says=message)


def test_pretrained_models_of_another_tokenizer_are_refused(workspace, tmp_path):
    """Our own checkpoint, and a Hugging Face folder with a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    import model
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path / "hf"
    model.GPT(model.GPTConfig(64, 512, 1, 2, 32)).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["def f(x):\n    return x\n"], 300, special_tokens=["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    args = ("--dataset=text", "--max_iters=1", *TINY, f"--out_dir={tmp_path}/out")
    says = "has another tokenizer than data/text"
    refused(*args, f"--pretrained={folder}", cwd=workspace, says=says)
    (folder / "tokenizer.json").unlink()
    refused(*args, f"--pretrained={folder}", cwd=workspace, says="tokenizer.json")
    assert call("train.py", *args, cwd=workspace)[0] == 0
    checkpoint = load(tmp_path / "out/ckpt.pt")
    checkpoint["meta"]["fingerprint"] = "0" * 16
    (tmp_path / "other").mkdir()
    torch.save(checkpoint, tmp_path / "other/ckpt.pt")
    new = (f"--pretrained={tmp_path}/other", f"--out_dir={tmp_path}/new")
    refused(*args, *new, cwd=workspace, says=says)


def test_going_on_uses_and_says_the_settings_of_now(workspace, tmp_path):
    """Every rate of both optimizers; what an older checkpoint does not tell of is passed over."""
    args = ("--dataset=text", "--optimizer=muon", *TINY, f"--out_dir={tmp_path}")
    assert call("train.py", *args, "--max_iters=5", "--learning_rate=1e-2", cwd=workspace)[0] == 0
    before = load(tmp_path / "ckpt.pt")
    still = ("--learning_rate=0", "--muon_lr=0", "--weight_decay=0.5", "--beta1=0.8", "--beta2=0.9")
    status, out, err = call("train.py", *args, "--max_iters=10", *still, cwd=workspace)
    line = next(line for line in out.splitlines() if line.startswith("going on from"))
    for change in ("max_iters: 5 -> 10", "learning_rate: 0.01 -> 0.0", "muon_lr: 0.02 -> 0.0",
                   "weight_decay: 0.1 -> 0.5", "beta1: 0.9 -> 0.8", "beta2: 0.95 -> 0.9"):
        assert change in line
    assert "at step 5" in line and "n_layer" not in line and "dataset" not in line
    after = load(tmp_path / "ckpt.pt")
    assert after["step"] == 10
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())  # rates of 0
    adamw, muon = (o["param_groups"][0] for o in after["optimizers"])
    assert (adamw["betas"], adamw["weight_decay"], muon["weight_decay"]) == ((0.8, 0.9), 0.5, 0.5)
    rates = [(x["step"], x["lr"], x["muon_lr"]) for x in log_lines(tmp_path) if "lr" in x]
    assert all(lr > 0 and muon_lr > 0 for step, lr, muon_lr in rates if step <= 5)
    assert [x for x in rates if x[0] > 5] == [(step, 0, 0) for step in range(6, 11)]
    del after["settings"]["beta1"]
    torch.save(after, tmp_path / "ckpt.pt")
    status, out, err = call("train.py", *args, *still, "--max_iters=11", "--beta1=0.7",
                            "--muon_lr=1e-9", cwd=workspace)
    assert status == 0 and "(max_iters: 10 -> 11, muon_lr: 0.0 -> 1e-09)" in out
    del after["settings"]
    torch.save(after, tmp_path / "ckpt.pt")
    status, out, err = call("train.py", *args, *still, "--max_iters=11", cwd=workspace)
    assert status == 0 and "at step 10 (nothing changed)" in out


def test_the_advice_after_a_loss_that_is_not_finite_works(workspace, tmp_path):
    """A run that diverges goes on with a lower rate; one that has saved nothing starts anew."""
    args = ("--dataset=text", *TINY, f"--out_dir={tmp_path}", "--grad_clip=0", "--warmup_iters=0")
    err = diverges(*args, "--max_iters=20", "--learning_rate=1e30", cwd=workspace)
    assert "the same command starts anew" in err
    assert call("train.py", *args, "--max_iters=10", cwd=workspace)[0] == 0
    err = diverges(*args, "--max_iters=20", "--learning_rate=1e30", cwd=workspace)
    assert f"goes on from {tmp_path}/ckpt.pt" in err
    lower = ("--max_iters=20", "--learning_rate=1e-3")
    status, out, err = call("train.py", *args, *lower, cwd=workspace)
    assert status == 0 and "at step 10" in out and "learning_rate: 0.003 -> 0.001" in out
    seen = losses(tmp_path)
    assert seen[-1][2] < seen[0][2]
    assert sorted({x[0] for x in seen}) == list(range(21))  # the steps that diverged are done again


def test_the_advice_after_a_torn_checkpoint_works(workspace, tmp_path):
    """A best.pt put in its place is gone on from; the optimizer starts anew, and this is said."""
    args = ("--dataset=text", *TINY, f"--out_dir={tmp_path}")
    assert call("train.py", *args, "--max_iters=10", cwd=workspace)[0] == 0
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    err = refused(*args, "--max_iters=20", cwd=workspace, says="ckpt.pt cannot be read")
    assert f"put {tmp_path}/best.pt in its place, or delete it to start anew" in err
    shutil.copy(tmp_path / "best.pt", tmp_path / "ckpt.pt")
    status, out, err = call("train.py", *args, "--max_iters=20", cwd=workspace)
    assert status == 0 and "at step 10" in out and "the optimizer starts anew" in out, err
    assert losses(tmp_path)[-1][2] < losses(tmp_path)[0][2]
    assert load(tmp_path / "ckpt.pt")["step"] == 20
    (tmp_path / "best.pt").unlink()
    for content in (b"", b"PK", whole[:100], "a text".encode()):
        (tmp_path / "ckpt.pt").write_bytes(content)
        err = refused(*args, "--max_iters=20", cwd=workspace, says="; delete it to start anew")
    torch.save({"model": {}, "iter_num": 3}, tmp_path / "ckpt.pt")  # nanoGPT's
    refused(*args, "--max_iters=20", cwd=workspace, says="cannot be read (KeyError('meta'))")
    torch.save({"meta": {"fingerprint": "0" * 16}, "model": {}}, tmp_path / "ckpt.pt")
    refused(*args, "--max_iters=20", cwd=workspace, says="cannot be read (KeyError('evaluated'))")


def dataset(folder, name, train, val, table=None):
    """data/<name> of text, or, with table = (train's, val's), of examples; tokens are given."""
    (folder / "data" / name).mkdir(parents=True)
    for split, tokens, rows in zip(("train", "val"), (train, val), table or (None, None)):
        np.array(tokens, "<u2").tofile(folder / "data" / name / f"{split}.bin")
        if table:
            rows = np.array(rows, np.int64).reshape(-1, 2)
            np.save(folder / "data" / name / f"{split}.examples.npy", rows)
    meta = {"tokenizer": "mine", "fingerprint": "0" * 16, "vocab_size": 64, "form": "edits" if table
            else "text", "train": {"tokens": len(train)}, "val": {"tokens": len(val)}}
    (folder / "data" / name / "meta.json").write_text(json.dumps(meta))
    return f"--dataset={name}"


def test_text_too_short_to_validate_on_is_said(tmp_path):
    """No figure comes from nothing: no validation loss, no best.pt; the run saves and goes on."""
    tokens = list(range(60)) * 20
    for val in ([], tokens[:64]):
        name = dataset(tmp_path, f"val{len(val)}", tokens, val)
        args = (name, *TINY, f"--out_dir={tmp_path}/{name}")
        status, out, err = call("train.py", *args, "--max_iters=10", cwd=tmp_path)
        assert status == 0 and out.count("no validation loss, and no best.pt") == 1, err
        assert "step 10: validation" not in out and "0.0000" not in out
        assert not [x for x in log_lines(tmp_path / name) if "val_loss" in x]
        assert load(tmp_path / name / "ckpt.pt")["step"] == 10
        assert not (tmp_path / name / "best.pt").exists()
    status, out, err = call("train.py", *args, "--max_iters=12", cwd=tmp_path)
    assert status == 0 and "at step 10" in out, err
    name = dataset(tmp_path, "short", tokens[:64], tokens)
    says = "data/short: nothing to train on in rows of block_size=64 tokens (0 rows of text)"
    refused(name, *TINY, cwd=tmp_path, says=says)


def test_examples_without_a_target_are_counted_and_left_out(tmp_path):
    """Prompts of 30, 65 and 10 tokens: the second leaves no room for its response in 64."""
    tokens, table = [], []
    for prompt, response in ((30, 50), (65, 20), (10, 5)):
        table.append((len(tokens), len(tokens) + prompt))
        tokens += [i % 64 for i in range(prompt + response)]
    name = dataset(tmp_path, "some", tokens, tokens, (table, table))
    status, out, err = call("train.py", name, *TINY, "--max_iters=3", cwd=tmp_path)
    said = "2 examples in 2 rows, 60.9% full, 1 truncated, 1 left out (response cut off)"
    assert status == 0 and out.count(said) == 2, out + err
    assert all(loss is None or loss > 1 for _, loss, _ in losses(tmp_path / "out"))
    rows = train.ExampleRows(tmp_path / "data/some", "train", settings(block_size=64))
    assert [(row[1] >= 0).sum() > 0 for row in (rows[i] for i in range(9))] == [True] * 9
    cut = tokens[80:165], [(0, 65)]  # the second alone
    name = dataset(tmp_path, "none", tokens, cut[0], (table, cut[1]))
    status, out, err = call("train.py", name, *TINY, "--max_iters=3", "--out_dir=o", cwd=tmp_path)
    assert status == 0 and "no validation loss, and no best.pt" in out and "step 3: val" not in out
    name = dataset(tmp_path, "nothing", cut[0], tokens, (cut[1], table))
    says = "nothing to train on in rows of block_size=64 tokens (0 examples in 0 rows, 0.0% full, 0"
    assert "1 left out" in refused(name, *TINY, cwd=tmp_path, says=says)
    name = dataset(tmp_path, "empty", [], [], ([], []))
    refused(name, *TINY, "--epochs=2", cwd=tmp_path, says="data/empty: nothing to train on")


def test_values_that_are_refused(workspace, tmp_path):
    counts = ("block_size", "batch_size", "micro_batch", "eval_interval", "log_interval", "epochs",
              "n_layer", "n_head", "n_embd")
    for arg, says in (
            *((f"--{key}=0", "is not at least 1") for key in counts),
            ("--decay=constant", "is not cosine or linear"),
            ("--optimizer=sgd", "is not adamw or muon"), ("--dtype=fp16", "is not auto or bfloat"),
            ("--device=tpu", "device tpu, rank 0"),
            ("--min_lr_ratio=2", "is not at least 0 and at most 1"),
            ("--beta1=1", "at least 0 and at most 0.99999"), ("--beta2=1", "at most 0.99999"),
            ("--muon_lr=-1", "is not at least 0"),
            ("--max_iters=-3", "is not at least 0"),
            ("--grad_clip=inf", "is not finite and at least 0"),
            ("--eval_rows=-1", "is not at least 0"), ("--warmup_iters=-1", "is not at least 0"),
            ("--dataset=", "data/meta.json is missing"),
            ("--dataset=nothing", "data/nothing/meta.json is missing"),
            ("--n_embd=33", "must be n_head=2 times an even number"),
            ("log.jsonl", "logs go with --plot")):
        refused("--dataset=text", *TINY, arg, f"--out_dir={tmp_path}", cwd=workspace, says=says)
    if not importlib.util.find_spec("wandb"):
        args = ("--dataset=text", *TINY, "--wandb=x", f"--out_dir={tmp_path}")
        refused(*args, cwd=workspace, says="pip install wandb")
    if not torch.cuda.is_available():
        refused("--device=cuda", cwd=workspace, says="device cuda, rank 0 of 1: ")
    (tmp_path / "file").touch()
    refused("--dataset=text", *TINY, f"--out_dir={tmp_path}/file", cwd=workspace, says="file")


def test_the_missing_data_comes_with_its_command(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/mine.py").write_text("dataset = 'mine'\n")
    says = "data/mine/meta.json is missing: python prepare.py config/mine.py --dataset=mine writes"
    refused("config/mine.py", cwd=tmp_path, says=says)


def test_values_at_the_edge_work(workspace, tmp_path):
    """A warm-up longer than the run is said; bfloat16 on a CPU; no clipping."""
    edges = ("--warmup_iters=9", "--dtype=bfloat16", "--compile=no", "--grad_clip=0",
             "--min_lr_ratio=1",
             "--block_size=1", "--seed=4294967295", "--max_iters=2", f"--out_dir={tmp_path}")
    status, out, err = call("train.py", "--dataset=text", *TINY, *edges, cwd=workspace)
    assert status == 0 and "warmup_iters=9: the learning rate rises until the run ends" in out, err


def test_auto_is_bfloat16_where_a_device_multiplies_it(monkeypatch):
    for flag, dtype in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"),
                        ("avx512_f", "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert train.pick_dtype("auto", torch.device("cpu")) == dtype
        assert train.pick_dtype("float32", torch.device("cpu")) == "float32"
        assert train.pick_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    assert train.pick_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert train.pick_dtype("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("dataset", ["text", "edits"])
def test_bfloat16_learns_what_float32_does(workspace, tmp_path, dataset):
    seen = []
    for dtype in ("float32", "bfloat16"):
        args = ("--optimizer=muon", f"--dtype={dtype}", "--max_iters=30", "--log_interval=1",
                f"--dataset={dataset}", f"--out_dir={tmp_path / dtype}")
        status, out, err = call("train.py", *LONGER, *args, cwd=workspace)
        assert status == 0 and f"cpu, {dtype}" in out, err
        seen.append([x["loss"] for x in log_lines(tmp_path / dtype) if "loss" in x])
    assert seen[0] != seen[1] and seen[0][-1] < seen[0][0] - 0.3
    assert all(abs(a - b) < 0.03 for a, b in zip(*seen)), seen


def test_compile_without_a_compiler_is_said(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    status, out, err = run("train.py", "--dataset=text", *TINY, "--compile=yes", "--max_iters=1",
                           f"--out_dir={tmp_path}", cwd=workspace)
    assert status == 1 and err.splitlines()[-1].endswith("or --compile=no"), err
    assert "Traceback" not in err


def test_data_that_is_broken_is_refused_in_a_line(tmp_path):
    tokens = [i % 64 for i in range(900)]
    name = dataset(tmp_path, "x", tokens, tokens, ([(0, 10), (300, 310)],) * 2)
    x, args = tmp_path / "data/x", (name, *TINY, "--max_iters=1")
    for file, content, says in (
            ("train.bin", b"123", "train.bin and val.bin hold other numbers of tokens"),
            ("train.examples.npy", b"123", "train.examples.npy is not what prepare.py wrote"),
            ("val.examples.npy", None, "val.examples.npy is not what prepare.py wrote"),
            ("val.bin", None, "data/x/val.bin is missing"),
            ("meta.json", b"{", "meta.json is not what prepare.py wrote"),
            ("meta.json", b"[]", "meta.json is not what prepare.py wrote"),
            ("meta.json", b'{"form": "text"}', "is not what prepare.py wrote (KeyError('train'))")):
        whole = (x / file).read_bytes()
        (x / file).unlink()
        if content:
            (x / file).write_bytes(content)
        refused(*args, cwd=tmp_path, says=says)
        (x / file).write_bytes(whole)
    assert call("train.py", *args, cwd=tmp_path)[0] == 0


def test_numbers_that_the_data_cannot_hold_are_refused(tmp_path):
    """Tokens beyond the vocabulary; examples that are not in order, or not those of the bin."""
    tokens, good = [i % 64 for i in range(900)], [(0, 10), (300, 310)]
    name = dataset(tmp_path, "big", tokens + [999] * 200, tokens)
    status, out, err = run("train.py", name, *TINY, "--max_iters=9", cwd=tmp_path)
    assert status == 1 and "numbers that its meta.json's vocab_size does not" in err, err
    assert err.count("\n") == 1
    for n, table in enumerate(([(0, 10), (3000, 3100)], [(300, 310), (0, 10)], [(-5, 10)],
                               [(0, 10), (300, 290)], [(0, 500), (300, 310)])):
        name = dataset(tmp_path, f"x{n}", tokens, tokens, (good, table))
        refused(name, *TINY, cwd=tmp_path, says="val.examples.npy is not what prepare.py wrote")


def test_two_runs_into_one_folder_are_refused(workspace, tmp_path):
    args = ("--dataset=text", "--max_iters=2000", *TINY, f"--out_dir={tmp_path}/out")
    process = start("train.py", *args, cwd=workspace)
    for line in process.stdout:
        if "step      1/" in line:
            break
    status, out, err = call("train.py", *args, cwd=workspace)
    process.kill()
    process.wait()
    assert status == 1 and "another run is writing there" in err and len(err.splitlines()) == 1


def test_a_gradient_that_is_not_finite_stops_the_run(workspace, tmp_path):
    """Noticed before it is applied, also where nothing is logged; its step and rows are named."""
    (tmp_path / "overflow.py").write_text(f"""
import runpy, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
from model import GPT
forward, calls = GPT.forward, 0
def overflows(self, *args):
    global calls
    logits, loss = forward(self, *args)
    calls += torch.is_grad_enabled()
    return logits, loss * (float("inf") if calls == 13 else 1)
GPT.forward = overflows
runpy.run_path({str(ROOT)!r} + "/train.py", run_name="__main__")
""")
    status, out, err = run(tmp_path / "overflow.py", "--dataset=text", "--max_iters=40", *TINY,
                           f"--out_dir={tmp_path}/out", "--log_interval=1000", cwd=workspace)
    assert status == 1 and len(err.splitlines()) == 1, err
    assert "at step 13, rows 96 to 103 of the order" in err, err
    checkpoint = load(tmp_path / "out/ckpt.pt")
    assert checkpoint["step"] == 10
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


def test_data_that_changed_under_a_checkpoint_is_refused(workspace, tmp_path):
    """As many tokens as before, but another one at an end."""
    shutil.copytree(workspace / "data", tmp_path / "data")
    args = ("--dataset=text", "--max_iters=1", *TINY, f"--out_dir={tmp_path}/out")
    assert call("train.py", *args, cwd=tmp_path)[0] == 0
    tokens = np.fromfile(tmp_path / "data/text/train.bin", dtype="<u2")
    for at in (0, -1):
        changed = tokens.copy()
        changed[at] ^= 1
        changed.tofile(tmp_path / "data/text/train.bin")
        status, out, err = call("train.py", *args, "--max_iters=2", cwd=tmp_path)
        assert status == 1 and err.count("\n") == 1 and "is of another run: data was [[" in err


def settings(**changes):
    keys = {k: v for k, v in vars(train.Settings).items() if not k.startswith("_")}
    return SimpleNamespace(**{**keys, **changes})


def test_text_rows_are_the_file_block_by_block(workspace):
    """Once an epoch, in an order of seed and epoch; validation's does not depend on the seed."""
    folder = workspace / "data/text"
    open_rows = lambda split, seed: train.TextRows(
        folder, split, settings(block_size=64, seed=seed))
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")
    n = (len(tokens) - 1) // 64
    blocks = [tuple(tokens[i * 64:i * 64 + 65]) for i in range(n)]
    rows, again, other = (open_rows("train", seed) for seed in (1, 1, 2))
    assert rows.count() == n and rows.count(3) == 3 * n
    epochs = [[(*rows[i][0], rows[i][1][-1]) for i in range(k * n, k * n + n)] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(blocks)
    assert epochs[0] != blocks and epochs[0] != epochs[1] != epochs[2]
    assert all((rows[i] == again[i]).all() for i in (2 * n + 5, 3, n))  # whatever was asked before
    assert any((rows[i] != other[i]).any() for i in range(9))
    assert (rows[5][0][1:] == rows[5][1][:-1]).all()
    near = sum(blocks.index(b) - blocks.index(a) == 1 for a, b in zip(epochs[0], epochs[0][1:]))
    assert near < n / 10  # neighbours do not stay together
    a, b = (open_rows("val", seed) for seed in (1, 2))
    assert all((a[i] == b[i]).all() for i in range(a.count()))


def test_packed_rows_hold_every_example_whole_once_an_epoch(workspace):
    from prepare import DIFF, get_tokenizer
    enc = get_tokenizer(str(workspace / "tiny.tiktoken"))
    rows = train.ExampleRows(workspace / "data/edits", "train", settings(block_size=1024))
    examples = [json.loads(line) for line in open(workspace / "edits.jsonl")]
    assert rows.truncated == rows.left_out == 0
    written = {x["source_instruction"] + "".join("\n" + DIFF + e for e in x["edit_path"])
               + ("\n" + DIFF) * 2 for x in examples}
    orders = []
    for epoch in range(2):
        seen = []
        for i in range(rows.count(epoch) if epoch else 0, rows.count(epoch + 1)):
            tokens, targets, segments = rows[i]
            for s in dict.fromkeys(segments[segments >= 0].tolist()):
                at = segments == s
                text = enc.decode(tokens[at].tolist())
                loss = enc.decode(targets[at][targets[at] >= 0].tolist())
                # loss on the response alone
                assert text[:text.index(DIFF) + len(DIFF)] + loss == text + "<|endoftext|>"
                seen.append(text)
            assert (targets[segments < 0] == -1).all()
        assert len(seen) == len(rows.begin) > 60 and set(seen) <= written
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert sum(rows.length) / (rows.count() * 1024) > 0.9


def test_schedule():
    cfg = settings(warmup_iters=10, min_lr_ratio=0.1)
    scale = [train.learning_rate_scale(i, 110, cfg) for i in range(110)]
    assert scale[0] == 0.1 and scale[9] == scale[10] == 1.0 and abs(scale[60] - 0.55) < 1e-6
    assert 0.1 <= scale[-1] < 0.101
    linear = settings(warmup_iters=10, min_lr_ratio=0.0, decay="linear")
    assert abs(train.learning_rate_scale(60, 110, linear) - 0.5) < 1e-6
    assert train.learning_rate_scale(0, 1, settings(warmup_iters=0)) == 1.0


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    g = torch.randn(3, 16, 48)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    got = train.orthogonalize(g)
    # the quintic's known band
    assert ((u.mT @ got @ vt.mT).diagonal(dim1=1, dim2=2) - 1).abs().max() < 0.35
    assert torch.allclose(train.orthogonalize(g.mT), got.mT, atol=1e-4)
    fused = torch.nn.Parameter(g.flatten(0, 1).clone())
    parts = [torch.nn.Parameter(x.clone()) for x in g]
    fused.grad = torch.randn_like(fused)
    for p, grad in zip(parts, fused.grad.chunk(3)):
        p.grad = grad.clone()
    train.Muon([dict(params=[fused], pieces=3)], 0.1, 0).step()
    train.Muon(parts, 0.1, 0).step()
    assert torch.allclose(fused, torch.cat([p for p in parts]), atol=1e-5)
    # tall ones, in a step with wide ones of their shape: as far as sqrt(rows / columns) says
    tall, wide = torch.nn.Parameter(torch.zeros(48, 16)), torch.nn.Parameter(torch.zeros(16, 48))
    tall.grad, wide.grad = g[0].mT.clone(), g[1].clone()
    train.Muon([tall, wide], 0.1, 0).step()
    assert torch.allclose(tall, -0.1 * 3 ** 0.5 * got[0].mT, atol=1e-4)
    assert torch.allclose(wide, -0.1 * got[1], atol=1e-4)


def test_plot_draws_a_png(workspace, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": i, "tokens": i * 10, "loss": 5 - i / 10} for i in range(9)]
    lines.append({"step": 9, "tokens": 90, "val_loss": 4})
    (tmp_path / "out").mkdir()
    text = "".join(json.dumps(x) + "\n" for x in lines) + '{"step": 10, "lo'  # a run is writing it
    (tmp_path / "out/log.jsonl").write_text(text)
    for try_it, *args in ((run, "--plot=plot.png", "out/log.jsonl"), (call, "--plot=plot.png")):
        status, out, err = try_it("train.py", *args, cwd=tmp_path)
        assert status == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG", err
        (tmp_path / "plot.png").unlink()
    says = "README.md is not the log.jsonl of a run"
    refused("--plot=plot.png", ROOT / "README.md", cwd=tmp_path, says=says)
    refused("--plot=plot.png", "nowhere.jsonl", cwd=tmp_path, says="nowhere.jsonl")
