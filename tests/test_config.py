"""Settings from a file and the command line, through the scripts that users type."""
import pytest
from conftest import ROOT, run

import config


def test_defaults_file_then_command_line(tmp_path):
    from train import Settings
    (tmp_path / "config").mkdir()
    mine = tmp_path / "config" / "mine.py"
    mine.write_text("_rows = 2 ** 5\nbatch_size = _rows * 4\nlearning_rate = 1\nnum_samples = 3\n")
    cfg = config.load(Settings, [str(mine), "--learning_rate=2e-3", "--max_iters=1e3", "--plot"])
    assert (cfg.batch_size, cfg.learning_rate, cfg.max_iters, cfg.plot, cfg.grad_clip) == (128, 2e-3, 1000, True, 1.0)
    assert type(cfg.learning_rate) is float and not hasattr(cfg, "num_samples")  # num_samples is another script's


@pytest.mark.parametrize("args, message", [
    (["--max_iter=5"], "unknown key 'max_iter'; the nearest is 'max_iters'"),
    (["--max_iters=many"], "max_iters='many' is not of type int (default 0)"),
    (["--max_iters=1.5"], "is not of type int"),
    (["--max_iters"], "no value; write --max_iters=0"),
    (["--plot=maybe"], "is not of type bool"),
    (["config/dem.py"], "no such config file; the nearest is config/demo.py"),
    (["config/mine.txt"], "a config file lives in a folder named config/"),
])
def test_mistakes_get_one_line(args, message, tmp_path):
    status, out, err = run("train.py", *args, cwd=tmp_path)
    assert status in (1, 2) and err.count("\n") == 1 and message in err and out == ""


@pytest.mark.parametrize("text, message", [("max_itrs = 3", "unknown key 'max_itrs'"), ("x = ", "SyntaxError"),
                                           ("batch_size = '4k'", "is not of type int")])
def test_mistakes_in_a_config_file(text, message, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text(text)
    status, out, err = run("sample.py" if "itrs" in text else "train.py", "config/mine.py", cwd=tmp_path)
    assert status == 2 and err.count("\n") == 1 and message in err and "mine.py" in err


@pytest.mark.parametrize("script", ["prepare", "lintseq", "train", "sample", "evaluate"])
def test_help_lists_every_key_with_its_comment(script, tmp_path):
    import importlib
    status, out, err = run(f"{script}.py", "--help", cwd=tmp_path)
    assert status == 0 and err == ""
    keys = [k for k in vars(importlib.import_module(script).Settings) if not k.startswith("_")]
    for key in keys:
        line = next(line for line in out.splitlines() if line.startswith(f"  --{key}="))
        assert len(line.split(None, 1)[1]) > 3, f"{key} has no comment"


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
        assert (tuned.learning_rate, tuned.decay, tuned.min_lr, tuned.weight_decay) == (3e-4, "linear", 0.0, 0.01)
        base = config.load(Settings, [str(ROOT / f"config/finetune_{name}_programs.py")])
        assert {k for k in vars(base) if getattr(base, k) != getattr(tuned, k)} == {"dataset", "out_dir", "epochs"}
