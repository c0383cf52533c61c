"""What a CUDA GPU does otherwise, against the CPU; skipped where there is none. Each test starts
processes of its own: all other tests hide the GPU from this one."""
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from conftest import ROOT, log_lines, run, start

SHAPE = ("--block_size=128", "--n_layer=2", "--n_head=2", "--n_embd=128", "--batch_size=8",
         "--micro_batch=8", "--warmup_iters=2", "--log_interval=1", "--eval_interval=10",
         "--max_iters=60", "--learning_rate=1e-3")


def python(program, cwd, ranks=1, *args):
    """Run a program that may import ours."""
    path = cwd / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(program))
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone",
                                      f"--nproc_per_node={ranks}"]
    done = subprocess.run([sys.executable, *launcher, str(path), *args], cwd=cwd, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder):
    return {(x["step"], key): x[key] for x in log_lines(folder) for key in ("loss", "val_loss")
            if key in x}


def train(workspace, out, *args):
    status, printed, err = run("train.py", f"--out_dir={out}", *SHAPE, *args, cwd=workspace)
    assert status == 0, printed + err
    return printed


@pytest.mark.parametrize("dataset", ["text", "edits"])
def test_a_compiled_bfloat16_run_is_the_cpus_and_goes_on_after_a_kill(gpu, workspace, dataset):
    data = f"--dataset={dataset}"
    printed = train(workspace, f"gpu-{dataset}", data)
    assert "cuda" in printed and "bfloat16" in printed
    train(workspace, f"cpu-{dataset}", data, "--device=cpu")
    args = (f"--out_dir=killed-{dataset}", data, *SHAPE)
    process = start("train.py", *args, cwd=workspace)
    while not (workspace / f"killed-{dataset}" / "ckpt.pt").exists():  # saved at step 10
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, printed, err = run("train.py", *args, cwd=workspace)
    assert status == 0 and "going on from" in printed, err
    gpu_run, killed, cpu = (losses(workspace / f"{run}-{dataset}")
                            for run in ("gpu", "killed", "cpu"))
    assert gpu_run.keys() == killed.keys() == cpu.keys() and len(cpu) == 67
    assert all(abs(gpu_run[k] - cpu[k]) < 0.03 for k in cpu), (gpu_run, cpu)
    assert all(abs(gpu_run[k] - killed[k]) < 0.03 for k in cpu), (gpu_run, killed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_on_one_gpu_train_as_one(gpu, workspace, optimizer):
    """With gloo, which carries a GPU's tensors too: NCCL refuses two ranks on one GPU."""
    args = ("--dataset=text", f"--optimizer={optimizer}", "--compile=no", "--dtype=float32", *SHAPE)
    train(workspace, f"one-{optimizer}", *args)
    python("""
        import os
        os.environ["LOCAL_RANK"] = "0"
        import torch.distributed as dist
        join = dist.init_process_group
        dist.init_process_group = lambda backend, **how: join("gloo", **how)
        import config, train
        config.run(train.main)
        """, workspace, 2, f"--out_dir=two-{optimizer}", *args)
    one, two = (losses(workspace / f"{run}-{optimizer}") for run in ("one", "two"))
    assert one.keys() == two.keys() and all(abs(one[k] - two[k]) < 2e-3 for k in one), (one, two)


def test_packed_examples_see_what_they_see_alone(gpu, tmp_path):
    """Flash attention over packed examples against the mask, and their gradients."""
    python("""
        import torch
        from model import GPT, GPTConfig
        torch.manual_seed(0)
        model = GPT(GPTConfig(256, 320, 2, 2, 128))
        segments = torch.randint(6, (4, 256)).sort().values
        idx, targets = torch.randint(320, (2, 4, 256))
        loss = model(idx, targets, segments)[1]
        loss.backward()
        right = [p.grad for p in model.parameters()]
        model.zero_grad()
        model.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            packed = model(idx.cuda(), targets.cuda(), segments.cuda())[1]
        packed.backward()
        assert abs(packed.item() - loss.item()) < 5e-3, (packed, loss)
        for name, p in model.named_parameters():
            mine, its = p.grad.cpu(), right.pop(0).cpu()
            assert (mine - its).norm() < 0.03 * its.norm(), name
        """, tmp_path)


def test_cuda_graphs_write_the_cpus_tokens(gpu, tmp_path):
    """In float32: greedy and drawn, in slots that are filled again, with edits taken back."""
    python("""
        import torch
        from model import GPT, GPTConfig
        torch.manual_seed(0)
        model = GPT(GPTConfig(192, 320, 3, 4, 64))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)  # far from uniform
        prompts = [torch.randint(320, (n,)).tolist() for n in (5, 40, 12, 1, 90, 8, 130, 12)] * 2
        most = [100, 3, 77, 150, 64, 1, 60, 33] * 2
        for temperature in (0, 1.0):
            for check_tokens in ((), range(0, 320, 8)):
                def write():
                    asked = [0] * len(prompts)
                    def check(i, new):
                        asked[i] += 1
                        return max(0, len(new) - 9) if asked[i] % 3 else None
                    return model.generate(
                        prompts, most, temperature=temperature, top_p=0.9, batch_size=5, chunk=16,
                        stop_tokens=(7,), check_tokens=check_tokens, check=check)
                right = write()
                model.cuda()
                mine = write()
                model.cpu()
                same = sum(a == b for a, b in zip(mine, right))
                assert same >= 15, (mine, right)  # a tie in the last bit may fall otherwise
        """, tmp_path)


def test_a_model_trained_on_it_is_sampled_and_scored(gpu, workspace):
    if not (workspace / "gpu-edits" / "ckpt.pt").exists():
        train(workspace, "gpu-edits", "--dataset=edits")
    status, program, shown = run("sample.py", "--init_from=gpu-edits", "--num_samples=2",
                                 "--prompt=Write a function", "--temperature=1",
                                 "--max_new_tokens=50", cwd=workspace)
    assert status == 0 and "Traceback" not in shown, shown
    status, table, err = run("evaluate.py", "--init_from=gpu-edits", "--benchmark=problems.jsonl",
                             "--limit=4", "--num_samples=3", "--edit_retries=0,2", "--ks=1,3",
                             "--max_new_tokens=60", cwd=workspace)
    assert status == 0 and "gpu-edits" in table, table + err
