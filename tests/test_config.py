"""Settings from a file and the command line, through the scripts that users type."""
import base64
import errno
import gzip
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from conftest import ROOT, call, run

import config


def test_defaults_file_then_command_line(tmp_path):
    from train import Settings
    (tmp_path / "config").mkdir()
    mine = tmp_path / "config" / "mine.py"
    mine.write_text("_rows = 2 ** 5\nbatch_size = _rows * 4\nlearning_rate = 1\nnum_samples = 3\n")
    cfg = config.load(Settings, [str(mine), "--learning_rate=2e-3", "--max_iters=1e3"])
    assert (cfg.batch_size, cfg.learning_rate, cfg.max_iters) == (128, 2e-3, 1000)
    assert cfg.grad_clip == 1.0
    assert type(cfg.learning_rate) is float
    assert not hasattr(cfg, "num_samples")  # another script's


@pytest.mark.parametrize("args, message", [
    (["--max_iter=5"], "unknown key 'max_iter'; the nearest is 'max_iters'"),
    (["--min_lr=6e-5"], "the nearest is 'min_lr_ratio'"),  # nanoGPT's, which is no ratio
    (["--max_iters=many"], "max_iters='many' is not of type int (default 0)"),
    (["--max_iters=1.5"], "is not of type int"),
    (["--max_iters"], "no value; write --max_iters=0"),
    (["--decay=LINEAR"], "decay='LINEAR' is not cosine or linear"),
    (["--compile=maybe"], "is not auto or yes or no"),
    (["--seed=-1"], "seed='-1' is not at least 0"),
    (["--learning_rate=nan"], "is not at least 0"),
    (["--learning_rate=inf"], "is not finite and at least 0"),
    (["--beta1=1.5"], "is not at least 0 and at most 0.99999"),
    (["config/dem.py"], "no such config file; the nearest is 'config/demo.py'"),
    (["config/mine.txt"], "a config file lives in config/ and ends in .py"),
])
def test_mistakes_get_one_line(args, message, tmp_path):
    try_it = run if args == ["--max_iter=5"] else call  # one as users start it
    status, out, err = try_it("train.py", *args, cwd=tmp_path)
    assert status in (1, 2) and err.count("\n") == 1 and message in err and out == ""


@pytest.mark.parametrize("text, message", [
    ("max_itrs = 3", "unknown key 'max_itrs'"), ("x = ", "SyntaxError"),
    ("batch_size = '4k'", "is not of type int")])
def test_mistakes_in_a_config_file(text, message, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text(text)
    try_it, script = (run, "sample.py") if "itrs" in text else (call, "train.py")
    status, out, err = try_it(script, "config/mine.py", cwd=tmp_path)
    assert status == 2 and err.count("\n") == 1 and message in err and "mine.py" in err


@pytest.mark.parametrize("script", ["prepare", "lintseq", "train", "sample", "evaluate"])
def test_help_lists_every_key_with_its_comment(script, tmp_path):
    import importlib
    try_it = run if script == "evaluate" else call
    status, out, err = try_it(f"{script}.py", "--help", cwd=tmp_path)
    assert status == 0 and err == ""
    keys = [k for k in vars(importlib.import_module(script).Settings) if not k.startswith("_")]
    for key in keys:
        line = next(line for line in out.splitlines() if line.startswith(f"  --{key}="))
        assert len(line.split(None, 1)[1]) > 3, f"{key} has no comment"


class Settings:
    decay: Literal["cosine", "linear"] = "cosine"
    compile: Literal["auto", "yes", "no"] = "auto"
    top_p: (0, 1) = 0.95
    ks: (1,) = (1, 10)
    corpora = ()
    unsafe = False


@pytest.mark.parametrize("args, key, value", [
    (["--compile=True"], "compile", "yes"), (["--compile"], "compile", "yes"),
    (["--compile=0"], "compile", "no"), (["--decay=linear"], "decay", "linear"),
    (["--top_p=0"], "top_p", 0.0), (["--top_p=1"], "top_p", 1.0),
    (["--ks=1,5,1e2"], "ks", (1, 5, 100)), (["--ks=7"], "ks", (7,)),
    (["--corpora=a,b"], "corpora", ("a", "b")), (["--corpora="], "corpora", ()),
    (["--unsafe"], "unsafe", True), (["--unsafe=no"], "unsafe", False)])
def test_choices_and_ranges_take_what_fits(args, key, value):
    assert getattr(config.load(Settings, args), key) == value


@pytest.mark.parametrize("args, message", [
    (["--ks=1,0"], "at least 1"), (["--ks="], "no list"), (["--top_p=1.01"], "at most 1"),
    (["--top_p=inf"], "at most 1"), (["--unsafe=maybe"], "is not of type bool"),
    (["--decay"], "no value"), (["--decay="], "cosine or linear")])
def test_choices_and_ranges_refuse_what_does_not(args, message, capsys):
    with pytest.raises(SystemExit):
        config.load(Settings, args)
    assert message in capsys.readouterr().err


SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-04,7]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("env, expected", [
    ({}, "0 1 0 None"),
    (SLURM, "0 1 0 None"),  # a batch script's one process sees the job's tasks and is none of them
    (SLURM | STEP, "2 4 1 gpu03"),
    (SLURM | STEP | {"SLURM_STEP_NODELIST": "login-1"}, "2 4 1 login-1"),
    # srun starts torchrun
    (SLURM | STEP | {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "1 8 1 None"),
])
def test_ranks_are_torchruns_or_those_of_a_step_of_srun(env, expected):
    code = ("import config, os; print(config.RANK, config.WORLD, config.LOCAL_RANK, "
            "os.environ.get('MASTER_ADDR'))")
    ours = ("SLURM", "RANK", "WORLD", "LOCAL", "MASTER")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | env,
                         capture_output=True, text=True)
    assert out.stdout.split() == expected.split(), out.stderr


def test_rows_of_a_file_are_read_the_same_everywhere(tmp_path):
    lines = [b'\xef\xbb\xbf{"a": "\xc3\xa9"}', b"", b"  ", b'{"a": "\\ud800"}',
             b'{"a": "\xed\xa0\x80"}', b'{"a": ', b"[1]", b'{"a": "\\ud83d\\ude00"}',
             b"[" * 100_000]
    expected = [(1, "\u00e9"), (4, "surrogate"), (5, "not UTF-8"), (6, "not JSON"),
                (7, "not a JSON object"), (8, "\U0001f600"), (9, "not JSON")]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(b"\n".join(lines))
    packed.write_bytes(gzip.compress(b"\n".join(lines)))
    for path in (plain, packed):
        rows = list(config.read_rows(path))
        assert [n for n, _ in rows] == [n for n, _ in expected]
        for (_, row), (_, text) in zip(rows, expected):
            assert row["a"] == text if isinstance(row, dict) else text in str(row)
    packed.write_bytes(packed.read_bytes()[:-20])  # a download that was cut
    assert "cannot be read" in str(list(config.read_rows(packed))[-1][1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    config.write_whole(path, b"one")
    limited = "import resource, config; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));" \
              "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);" \
              f"config.write_whole({str(path)!r}, b'two' * 9999)"
    failed = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True,
                            text=True)
    assert "File too large" in failed.stderr
    assert path.read_bytes() == b"one" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_second_run_is_kept_from_a_locked_file(tmp_path):
    held = config.lock_file(tmp_path / "lock")
    code = f"import config; config.lock_file({str(tmp_path / 'lock')!r}); print('locked')"
    try_it = lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                                    text=True)
    second = try_it()
    assert second.returncode == 1 and "another run is writing there" in second.stderr
    assert not second.stdout
    held.close()
    assert try_it().stdout == "locked\n"


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(config.fcntl, "flock", flock)
    with pytest.raises(SystemExit):
        config.run(lambda: config.lock_file(tmp_path / "lock"))
    error = capsys.readouterr().err
    assert "No locks available" in error and "another run" not in error


@pytest.mark.parametrize("value, default, allowed, expected", [
    ("2147483647", 0, None, 2147483647), ("2147483648", 0, None, None),
    (1e6, 0, None, 1000000),
    (1, 0.5, None, 1.0), (True, "auto", ("auto", "yes", "no"), "yes"), (False, True, None, False),
    (5, (), None, None), ([1, "2"], (1,), None, (1, 2)), (True, 0, None, None),
    (True, 0.5, None, None), ("inf", 0.5, None, None), ("nan", 0.5, None, None),
    ("nan", 0, None, None), ("inf", 0, None, None), ("-0.5", 0.5, None, None),
    ([1], 0, None, None), (None, "", None, None), ("²", 0, None, None)])
def test_a_value_takes_its_defaults_type_or_is_refused(value, default, allowed, expected):
    if expected is None:
        with pytest.raises(ValueError):
            config.convert(value, default, allowed)
    else:
        got = config.convert(value, default, allowed)
        assert got == expected and type(got) is type(expected)


def test_what_was_written_whole_and_is_broken_now_is_named(tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "data/hub").mkdir(parents=True)
    (tmp_path / "data/hub/fineweb.json").write_text('["c0ffee", {')
    (tmp_path / "t.tiktoken").write_text("".join(
        f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256)))
    status, out, err = call("prepare.py", "--corpora=fineweb", "--tokenizer=t.tiktoken",
                            cwd=tmp_path)
    assert status == 1 and "data/hub/fineweb.json is broken" in err and err.count("\n") == 1


def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch, capsys):
    from config import _preflight
    says = "make 150m: GPUS={!r} is no number of GPUs\n".format
    made = subprocess.run([sys.executable, "-m", "config._preflight", "150m", "0", "--unsafe"],
                          cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (2, says("0"))
    for gpus in ("x", "-1", ""):
        monkeypatch.setattr(sys, "argv", ["_preflight.py", "150m", gpus, "--unsafe"])
        with pytest.raises(SystemExit) as end:
            _preflight.main()
        assert (end.value.code, capsys.readouterr().err) == (2, says(gpus))


def test_no_sandbox_is_said_before_the_hours_of_training(monkeypatch, capsys):
    from config import _preflight

    def refuse(source, unsafe):
        if not unsafe:
            raise RuntimeError("no sandbox: to run programs all the same: --unsafe")
    monkeypatch.setattr(_preflight.evaluate, "run_program", refuse)
    monkeypatch.setattr(sys, "argv", ["_preflight.py", "demo", "1"])
    with pytest.raises(SystemExit):
        _preflight.main()
    assert capsys.readouterr().err == ("make demo: no sandbox: to run programs all the same: "
                                       "--unsafe, as in make demo UNSAFE=--unsafe\n")
    sys.argv = ["_preflight.py", "demo", "1", "--unsafe"]
    _preflight.main()
    sys.argv[3] = "1"  # evaluate.py would refuse it in the end
    with pytest.raises(SystemExit):
        _preflight.main()
    assert "UNSAFE=1: write UNSAFE=--unsafe" in capsys.readouterr().err


def test_a_fault_of_the_code_is_no_fault_of_the_data():
    for message in ("list index out of range", "index 5 is out of bounds for axis 0 with size 3"):
        def main():
            raise IndexError(message)
        with pytest.raises(IndexError):
            config.run(main)


def test_a_reader_that_goes_away_is_no_success(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * 500)
    made = subprocess.run(["bash", "-c", f"{sys.executable} {ROOT}/lintseq.py " + "long.py " * 99
                           + "| head -1; echo ${PIPESTATUS[0]}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert made.stdout.endswith("\n141\n") and made.stderr == ""


def test_an_editors_lock_beside_the_scripts_is_passed_over(tmp_path, monkeypatch):
    from train import Settings
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text())
    (tmp_path / ".#train.py").symlink_to("user@host:1")  # a link to nowhere, as Emacs makes it
    monkeypatch.setattr(config, "ROOT", tmp_path)
    assert config.load(Settings, ["--max_iters=3"]).max_iters == 3


def test_an_output_without_the_letters_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "a.py").write_text("x = '\u00e9'\n", encoding="utf-8")
    status, out, err = run("lintseq.py", "a.py", cwd=tmp_path)
    assert status == 0 and "+x = '\\xe9'" in out, err


def test_every_config_file_loads_in_every_script():
    import importlib
    files = sorted((ROOT / "config").glob("[!_]*.py"))
    assert {"demo", "150m", "400m", "finetune_150m", "finetune_400m"} <= {f.stem for f in files}
    for script in ("prepare", "lintseq", "train", "sample", "evaluate"):
        for file in files:
            config.load(importlib.import_module(script).Settings, [str(file)])


def test_the_papers_figures():
    from train import Settings
    for name, layers, heads, width in (("150m", 12, 12, 768), ("400m", 24, 16, 1024)):
        cfg = config.load(Settings, [str(ROOT / f"config/{name}.py")])
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size) == (layers, heads, width, 1024)
        assert abs(cfg.max_iters * cfg.batch_size * cfg.block_size / 72e9 - 1) < 1e-4
        tuned = config.load(Settings, [str(ROOT / f"config/finetune_{name}.py")])
        assert (tuned.learning_rate, tuned.decay) == (3e-4, "linear")
        assert (tuned.min_lr_ratio, tuned.weight_decay) == (0.0, 0.01)
        base = config.load(Settings, [str(ROOT / f"config/finetune_{name}_programs.py")])
        assert {k for k in vars(base) if getattr(base, k) != getattr(tuned, k)} == {
            "dataset", "out_dir", "epochs"}


@pytest.mark.parametrize("gpus, change, message", [
    (8, {}, "this machine has 4 CUDA GPUs, not 8"), (3, {}, "GPUS=3 does not divide the batch"),
    (4, {"token": None}, "no Hugging Face token"),
    (4, {"free": 150e9}, "50 GB of disk are missing for data"),
    (4, {"free": 250e9}, "70 GB of disk are missing for {hub}"),  # on the disk of data/
    (4, {"free": 250e9, "cached": 80e9}, None), (4, {"free": 330e9}, None),
    (4, {"free": 0, "token": None, "made": True}, None)])
def test_what_the_papers_run_lacks_is_said_first(gpus, change, message, tmp_path, monkeypatch,
                                                 capsys):
    hub = pytest.importorskip("huggingface_hub")
    import torch
    from config import _preflight
    change = {"token": "hf_x", "free": 1e15, "cached": 0, "made": False} | change
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["_preflight.py", "150m", str(gpus), "--unsafe"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(hub, "get_token", lambda: change["token"])
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(_preflight.shutil, "disk_usage",
                        lambda path: SimpleNamespace(free=change["free"]))
    cached = tmp_path / "hub/datasets--bigcode--the-stack/blobs/x"
    cached.parent.mkdir(parents=True)
    with open(cached, "wb") as f:
        f.truncate(int(change["cached"]))
    if change["made"]:
        config.write_whole("data/pretrain/meta.json", b"{}")
    if message:
        with pytest.raises(SystemExit):
            _preflight.main()
        error = capsys.readouterr().err
        assert message.format(hub=tmp_path / "hub") in error and error.count("\n") == 1
    else:
        _preflight.main()


@pytest.mark.parametrize("script, nothing", [("sample", ""), ("evaluate", ())])
@pytest.mark.parametrize("name", ["demo", "demo_programs", "demo_edits"])
def test_a_demo_file_means_its_own_runs_model(script, nothing, name):
    import importlib
    cfg = config.load(importlib.import_module(script).Settings, [str(ROOT / f"config/{name}.py")])
    assert cfg.init_from == nothing and cfg.out_dir == "out-" + name.replace("_", "-")


def test_threads_make_room_for_other_busy_processes(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(config, "_cpus", 4)
    monkeypatch.setattr(config, "_last_look", None)
    # the clock, all CPUs' seconds, this process' seconds
    now, most = [0.0, 0.0, 0.0], torch.get_num_threads()
    monkeypatch.setattr(config.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(config, "read_cpu_seconds", lambda: tuple(now[1:]))

    def after(seconds, busy, own):
        now[:] = now[0] + seconds, now[1] + busy, now[2] + own
        config.adapt_threads()
        return torch.get_num_threads()

    try:
        torch.set_num_threads(4)
        assert after(0, 0, 0) == 4
        assert after(2, 7.5, 7.5) == 4  # alone
        assert after(2, 8, 6) == 3  # one other
        assert after(0.5, 2, 0) == 3  # too soon to look
        assert after(2, 8, 0.5) == 1  # four others: one thread is left
        assert after(2, 2, 2) == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's word holds
        assert after(2, 8, 0.5) == 4
    finally:
        torch.set_num_threads(most)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux's")
def test_the_seconds_that_cpus_were_busy():
    before, end = config.read_cpu_seconds(), time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    busy, own = (now - was for now, was in zip(config.read_cpu_seconds(), before))
    assert 0.2 < own < 0.6 and own - 0.1 < busy < 0.7 * os.cpu_count()


@pytest.mark.parametrize("env", [{"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": "0"},
                                 {"RANK": "2", "WORLD_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "0"}])
def test_ranks_that_cannot_be(env):
    process = subprocess.run([sys.executable, "-c", "import config"], cwd=ROOT, text=True,
                             env={**os.environ, **env}, capture_output=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith(
        "the environment's RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is wrong")
