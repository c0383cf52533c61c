"""train.py as users run it: to the end, stopped and resumed, killed, on two ranks; and its rows, schedule and Muon."""
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run, start

import train

TINY = ("--block_size=64", "--n_layer=2", "--n_head=2", "--n_embd=32", "--batch_size=8", "--micro_batch=8",
        "--warmup_iters=2", "--learning_rate=3e-3", "--eval_rows=16", "--eval_interval=10", "--log_interval=1")


def losses(folder):
    return [(x["step"], x.get("loss"), x.get("val_loss")) for x in map(json.loads, open(folder / "log.jsonl"))]


def same_state(a, b):
    a, b = (torch.load(f / "ckpt.pt", weights_only=True) for f in (a, b))
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
    """A train.py that is killed half-way through writing the checkpoint of a step, or finds the disk full there."""
    (folder / "faulty.py").write_text(FAULTY.format(root=str(ROOT), what=what, step=step))
    return folder / "faulty.py"


def stop_at(step, number, *args, **kwargs):
    """Send the signal to a run when it has said this step's line; (exit status, the rest of its output)."""
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
    status, out, err = run("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace)
    assert status == 0, err
    whole = losses(tmp_path / "whole")
    assert whole[-1][2] < whole[0][2] - 0.5  # validation loss fell
    assert all(len(line) <= 120 for line in out.splitlines() if line.startswith("step"))
    args = (*args, f"--out_dir={tmp_path}/cut")
    if optimizer == "adamw":  # killed three steps past the checkpoint of step 10, in the middle of a line of the log
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
    best = torch.load(tmp_path / "cut/best.pt", weights_only=True)
    assert best["best"] == min(x[2] for x in whole[1:] if x[2] is not None)
    status, out, err = run("train.py", *args, cwd=workspace)
    assert status == 0 and "is finished (30 steps)" in out


def test_two_ranks_killed_and_stopped_resume_bit_for_bit(workspace, tmp_path):
    """Rank 0 dies in the middle of a save: the other ends too; then torchrun is asked to stop just where an evaluation
    is due; the third run ends as one that was never stopped."""
    args = ("--dataset=edits", "--max_iters=12", *TINY, "--eval_interval=4")
    assert run("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace, ranks=2)[0] == 0
    args = (*args, f"--out_dir={tmp_path}/cut")
    status, out, err = run(faulty(tmp_path, "kill", 8), *args, cwd=workspace, ranks=2)
    assert status == 1 and "rank 1: another rank has ended" in err and "SIGKILL" in err
    assert torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["step"] == 4
    status, out = stop_at(8, signal.SIGTERM, *args, cwd=workspace, ranks=2)
    assert status != 0 and "asked to stop: saved" in out
    assert torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["step"] < 12
    status, out, err = run("train.py", *args, cwd=workspace, ranks=2)
    assert status == 0 and "going on from" in out, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    same_state(tmp_path / "cut", tmp_path / "whole")


def test_sigterm_saves_and_two_ranks_go_on(workspace, tmp_path):
    """One rank, asked to stop in the middle; two ranks finish the run; the losses are those of one."""
    args = ("--dataset=edits", "--max_iters=12", *TINY)
    assert run("train.py", *args, f"--out_dir={tmp_path}/whole", cwd=workspace)[0] == 0
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
        assert run("train.py", "--dataset=edits", "--max_iters=5", *TINY, f"--micro_batch={micro}",
                   f"--out_dir={tmp_path}/{micro}", cwd=workspace)[0] == 0
    for a, b in zip(losses(tmp_path / "8"), losses(tmp_path / "3")):
        assert all(abs(x - y) < 1e-4 for x, y in zip(a[1:], b[1:]) if x is not None)


def test_finetunes_from_pretrained_and_refuses_what_does_not_fit(workspace, tmp_path):
    pre, out_dir = f"{tmp_path}/pre", f"--out_dir={tmp_path}/tuned"
    assert run("train.py", "--dataset=text", "--max_iters=10", *TINY, f"--out_dir={pre}", cwd=workspace)[0] == 0
    tune = ("--dataset=programs", "--epochs=2", *TINY, f"--pretrained={pre}")
    status, out, err = run("train.py", *tune, out_dir, "--max_iters=2", cwd=workspace)
    assert status == 0, err
    assert run("train.py", *tune, "--pretrained=", f"--out_dir={tmp_path}/new", "--max_iters=1", cwd=workspace)[0] == 0
    first, untrained = (losses(tmp_path / x)[0][2] for x in ("tuned", "new"))  # on the same rows, before any step
    assert first < untrained - 0.1
    for change, message in ((("--batch_size=4",), "batch_size was 8, is 4"), (("--dataset=edits",), "is of another data"),
                            (("--pretrained=", "--n_layer=3"), "n_layer was 2, is 3"), (("--seed=1",), "seed was 1337, is 1"),
                            (("--pretrained=", "--n_head=3"), "n_embd=32 must be n_head=3 times")):
        status, out, err = run("train.py", *tune, out_dir, *change, cwd=workspace)
        assert status == 1 and message in err and "Traceback" not in err
    (tmp_path / "tuned" / "ckpt.pt").write_bytes((tmp_path / "tuned" / "ckpt.pt").read_bytes()[:5000])
    status, out, err = run("train.py", *tune, out_dir, cwd=workspace)
    assert status == 1 and "cannot be read" in err and "Traceback" not in err
    for args, message in ((("--dataset=nothing",), "data/nothing/meta.json is missing"),
                          (("--pretrained=nowhere", "--dataset=text"), "nowhere")):
        status, out, err = run("train.py", *TINY, *args, f"--out_dir={tmp_path}/x", cwd=workspace)
        assert status == 1 and message in err and "Traceback" not in err


def test_two_runs_into_one_folder_are_refused(workspace, tmp_path):
    args = ("--dataset=text", "--max_iters=2000", *TINY, f"--out_dir={tmp_path}/out")
    process = start("train.py", *args, cwd=workspace)
    for line in process.stdout:
        if "step      1/" in line:
            break
    status, out, err = run("train.py", *args, cwd=workspace)
    process.kill()
    process.wait()
    assert status == 1 and "another run is writing to" in err


def test_a_loss_that_is_not_finite_stops_the_run(workspace, tmp_path):
    """Noticed before it is saved, also where no line is logged at that step; the step and its rows are named."""
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
    status, out, err = run(tmp_path / "overflow.py", "--dataset=text", "--max_iters=40", *TINY, f"--out_dir={tmp_path}/out",
                           "--log_interval=1000", cwd=workspace)
    assert status == 1 and len(err.splitlines()) == 1 and "at step 13, rows 96 to 103 of the order" in err, err
    checkpoint = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 10 and all(v.isfinite().all() for v in checkpoint["model"].values())


def test_data_that_changed_under_a_checkpoint_is_refused(workspace, tmp_path):
    """As many tokens as before, but others."""
    shutil.copytree(workspace / "data", tmp_path / "data")
    args = ("--dataset=text", "--max_iters=1", *TINY, f"--out_dir={tmp_path}/out")
    assert run("train.py", *args, cwd=tmp_path)[0] == 0
    tokens = np.fromfile(tmp_path / "data/text/train.bin", dtype="<u2")
    tokens[::-1].tofile(tmp_path / "data/text/train.bin")
    status, out, err = run("train.py", *args, "--max_iters=2", cwd=tmp_path)
    assert status == 1 and "is of another data: data was [[" in err and len(err.splitlines()) == 1


def test_permutation_visits_everything_once():
    for n in (1, 2, 5, 64, 1000, 1025):
        orders = [[train.permuted(i, n, key) for i in range(n)] for key in (1, 2)]
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(n))
        if n >= 64:
            assert orders[0] != orders[1] and orders[0] != list(range(n))
            near = sum(abs(a - b) == 1 for a, b in zip(orders[0], orders[0][1:]))
            assert near < n / 10  # neighbours do not stay together


def settings(**changes):
    keys = {k: v for k, v in vars(train.Settings).items() if not k.startswith("_")}
    return SimpleNamespace(**{**keys, **changes})


def test_text_rows_are_the_file_block_by_block(workspace):
    rows = train.TextRows([workspace / "data/text", workspace / "data/text"], "train", settings(block_size=64))
    tokens = np.fromfile(workspace / "data/text/train.bin", dtype="<u2")
    n = (len(tokens) - 1) // 64
    assert rows.n == 2 * n
    seen = [rows.row(i) for i in range(rows.n)]
    starts = sorted(tuple(idx) for idx, _, _ in seen)
    assert starts == sorted(tuple(tokens[i * 64:i * 64 + 64]) for i in range(n) for _ in range(2))
    idx, targets, _ = rows.row(5, shuffle=False)
    assert (idx == tokens[320:384]).all() and (targets == tokens[321:385]).all()
    assert [tuple(rows.row(i)[0]) for i in range(rows.n, 2 * rows.n)] != [tuple(x[0]) for x in seen]  # another epoch


def test_packed_rows_hold_every_example_whole_once_an_epoch(workspace):
    from prepare import DIFF, get_tokenizer
    enc = get_tokenizer(str(workspace / "tiny.tiktoken"))
    rows = train.ExampleRows([workspace / "data/edits"], "train", settings(block_size=512))
    examples = [json.loads(line) for line in open(workspace / "edits.jsonl")]
    assert rows.truncated == 0
    seen = []
    for i in range(rows.rows_in(1)):
        tokens, targets, segments = rows.row(i)
        for s in dict.fromkeys(segments[segments >= 0].tolist()):
            at = segments == s
            text = enc.decode(tokens[at].tolist())
            loss = enc.decode(targets[at][targets[at] >= 0].tolist())
            assert text[:text.index(DIFF) + len(DIFF)] + loss == text + "<|endoftext|>"  # loss on the response alone
            seen.append(text)
        assert (targets[segments < 0] == -1).all()
    written = [x["source_instruction"] + "".join("\n" + DIFF + e for e in x["edit_path"]) + ("\n" + DIFF) * 2
               for x in examples]
    assert len(seen) == len(rows.begin) > 60 and sorted(seen) == sorted(set(seen) & set(written)) or set(seen) <= set(written)
    assert sum(rows.length) / (rows.rows_in(1) * 512) > 0.9


def test_schedule():
    cfg = settings(warmup_iters=10, min_lr=0.1)
    scale = [train.lr_scale(i, 110, cfg) for i in range(110)]
    assert scale[0] == 0.1 and scale[9] == scale[10] == 1.0 and abs(scale[60] - 0.55) < 1e-6 and 0.1 <= scale[-1] < 0.101
    assert abs(train.lr_scale(60, 110, settings(warmup_iters=10, min_lr=0.0, decay="linear")) - 0.5) < 1e-6


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    g = torch.randn(3, 16, 48)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    got = train.orthogonalize(g)
    assert ((u.mT @ got @ vt.mT).diagonal(dim1=1, dim2=2) - 1).abs().max() < 0.35  # the quintic's known band
    assert torch.allclose(train.orthogonalize(g.mT), got.mT, atol=1e-4)
    fused, parts = torch.nn.Parameter(g.flatten(0, 1).clone()), [torch.nn.Parameter(x.clone()) for x in g]
    fused.grad, grads = torch.randn_like(fused), None
    for p, grad in zip(parts, fused.grad.chunk(3)):
        p.grad = grad.clone()
    train.Muon([dict(params=[fused], pieces=3)], lr=0.1).step()
    train.Muon(parts, lr=0.1).step()
    assert torch.allclose(fused, torch.cat([p for p in parts]), atol=1e-5)


def test_plot_draws_a_png(workspace, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": i, "tokens": i * 10, "loss": 5 - i / 10} for i in range(9)] + [{"step": 9, "tokens": 90, "val_loss": 4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    status, out, err = run("train.py", "--plot", tmp_path / "log.jsonl", cwd=tmp_path)
    assert status == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
