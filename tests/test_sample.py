"""sample.py: edits that are drawn again, what it shows, and one line for whatever is wrong."""

import errno
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import response

import config
import lintseq
import model as model_module
import prepare
import sample
from model import GPT, GPTConfig

PROGRAM = (
    "import os\n\n\ndef f(x):\n    if x:\n        return os.sep\n    return x\n\n\nprint(f(1))\n"
)
GOOD = "@@ -0,0 +1 @@\n+x = 1"
MORE = "@@ -1,0 +2 @@\n+print(x)"
BAD = {
    "a name that nothing defines": "@@ -1,0 +2 @@\n+print(y)",
    "a syntax error": "@@ -1,0 +2 @@\n+print(",
    "a place that is not there": "@@ -7,0 +8 @@\n+print(x)",
    "a wrong count": "@@ -1,0 +2,4 @@\n+print(x)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """out/ with ckpt.pt and best.pt of a model that knows one answer, its tokenizer, problems."""
    folder = tmp_path_factory.mktemp("sample")
    prepare.train_tokenizer(folder / "small.tiktoken", [PROGRAM * 20], 300)
    enc = prepare.get_tokenizer(str(folder / "small.tiktoken"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=320, n_layer=1, n_head=2, n_embd=32))
    ids = prepare.encode_prompt(enc, "edits", "Write f.") + enc.encode(
        response(GOOD, MORE), allowed_special="all"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(100):
        model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        "config": vars(model.config),
        "model": model.state_dict(),
        "step": 7,
        "best": 1.0,
        "meta": {
            "form": "edits",
            "tokenizer": "small.tiktoken",
            "vocab_size": enc.n_vocab,
            "fingerprint": prepare.fingerprint(enc),
        },
    }
    (folder / "out").mkdir()
    torch.save(state, folder / "out/best.pt")  # as train.py keeps it
    torch.save(state | {"optimizers": []}, folder / "out/ckpt.pt")
    (folder / "problems.jsonl").write_text(
        '{"instruction": "Write f."}\n{"instruction": "Write g."}\n'
    )
    return folder


@pytest.fixture(scope="module")
def enc(folder):
    return prepare.get_tokenizer(str(folder / "small.tiktoken"))


@pytest.fixture
def model():
    return GPT(GPTConfig(block_size=512, vocab_size=320, n_layer=1, n_head=2, n_embd=16))


def script(monkeypatch, enc, write):
    """Every model now writes write(i, edits so far, temperature), after what it has written."""

    def draw(decoder, rows):
        texts = [write(row.i, enc.decode(list(row.new)), row.temperature) for row in rows]
        ids = [enc.encode(text, allowed_special="all") for text in texts]
        assert all(row.new == new[: len(row.new)] for row, new in zip(rows, ids))
        return [new[len(row.new) :][:1] for row, new in zip(rows, ids)]

    monkeypatch.setattr(model_module.Decoder, "draw", draw)


def complete(model, enc, n, retries=2, temperature=0.0, **more):
    return sample.complete(
        model,
        enc,
        "edits",
        ["f"] * n,
        max_new_tokens=400,
        temperature=temperature,
        top_p=1.0,
        seeds=range(n),
        edit_retries=retries,
        **more,
    )


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_edit_is_drawn_again_so_many_times_then_taken(monkeypatch, model, enc, kind):
    drawn, seen = [], []

    def write(i, text, temperature):
        start = response(GOOD).removesuffix("\n<|diff|><|endoftext|>")
        bad = response(GOOD, BAD[kind])
        if text == start:
            drawn.append(temperature)
        return bad if i == 0 or len(drawn) < 4 else response(GOOD, MORE)

    script(monkeypatch, enc, write)
    (raw,) = complete(model, enc, 1, on_text=lambda i, text: seen.append(text))
    assert raw == response(GOOD, BAD[kind]).removesuffix("<|endoftext|>")
    assert drawn == [0.0, 1.0, 1.0]  # greedy, then at temperature 1
    back = [text for before, text in zip(seen, seen[1:]) if len(text) < len(before)]
    assert back == [GOOD + "\n<|diff|>"] * 2 and seen[-1] == raw
    drawn.clear()
    assert complete(model, enc, 1, retries=0) == [raw] and drawn == [0.0]


def test_what_is_drawn_again_may_be_good_and_the_rest_is_greedy(monkeypatch, model, enc):
    temperatures = {}

    def write(i, text, temperature):
        edits = [GOOD, MORE, "@@ -0,0 +1 @@\n+import os", "@@ -1,0 +2 @@\n+print(os.sep)"]
        at = text.count("<|diff|>")
        temperatures.setdefault((i, at), []).append(temperature)
        edits[1] = BAD["a syntax error"] if i and at == 1 and not temperature else MORE
        return response(*edits)

    script(monkeypatch, enc, write)
    raws = complete(model, enc, 3, batch_size=2)
    assert (
        raws
        == [
            response(GOOD, MORE, "@@ -0,0 +1 @@\n+import os", "@@ -1,0 +2 @@\n+print(os.sep)")[:-13]
        ]
        * 3
    )
    for (i, at), found in temperatures.items():
        assert found[-1] == (1.0 if i and at == 1 else 0.0)
    assert (
        sample.read_program("edits", "f", raws[0])[0] == "import os\nprint(os.sep)\nx = 1\nprint(x)"
    )


def test_every_edit_has_its_own_tries(monkeypatch, model, enc):
    bad, starts = [BAD["a name that nothing defines"], "@@ -2,0 +3 @@\n+print(z)"], []

    def write(i, text, temperature):
        if text.endswith("<|diff|>"):
            starts.append(text.count("<|diff|>"))
        return response(GOOD, *bad)

    script(monkeypatch, enc, write)
    assert complete(model, enc, 1) == [response(GOOD, *bad)[:-13]]
    assert starts == [1] * 3 + [2] * 3 + [3, 4]  # once, and twice again


def test_a_marker_within_a_line_is_text(monkeypatch, model, enc):
    odd = "@@ -0,0 +1 @@\n+x = '<|diff|>'"  # half of the program, at that marker, is a syntax error
    asked = []
    script(
        monkeypatch,
        enc,
        lambda i, text, temperature: asked.append(temperature) or response(odd, MORE),
    )
    assert complete(model, enc, 1) == [response(odd, MORE)[:-13]] and set(asked) == {0.0}


def test_a_tokenizer_without_the_marker_spells_it(monkeypatch, model, enc):
    plain = tiktoken.Encoding(
        "plain",
        pat_str=enc._pat_str,
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens={"<|endoftext|>": enc.eot_token},
    )
    bad, tries = BAD["a name that nothing defines"], []

    def write(i, text, temperature):
        tries.append(text == GOOD + "\n<|diff|>")
        return response(GOOD, MORE if temperature or "print(x)" in text else bad)

    script(monkeypatch, plain, write)
    assert complete(model, plain, 1) == [response(GOOD, MORE)[:-13]] and sum(tries) == 2


def test_prompts_without_room_stops_and_rows_without_a_token(monkeypatch, model, enc):
    done, seen = {}, []

    def write(i, text, temperature):
        seen.append(text)
        return "x = 1\ny = 2\nprint(x)<|endoftext|>"

    script(monkeypatch, enc, write)
    raws = sample.complete(
        model,
        enc,
        "text",
        ["f", "f" * 600, "", "g"],
        max_new_tokens=50,
        temperature=1.0,
        top_p=1.0,
        seeds=range(4),
        stop=("\nprint", "\ndef"),
        on_done=done.__setitem__,
    )
    assert raws == ["x = 1\ny = 2", None, None, "x = 1\ny = 2"] == [done[i] for i in range(4)]
    assert not any("\nprint" in text for text in seen)  # nothing is drawn after a stop
    monkeypatch.undo()
    for likeliest, text in ((315, ""), (0, 5 * enc.decode([0]))):  # 315: a row that no token has
        torch.nn.init.zeros_(model.wte.weight)
        model.wte.weight.data[:, 0], model.wte.weight.data[likeliest, 0] = 1, 9
        assert sample.complete(model, enc, "text", ["f"], max_new_tokens=5, temperature=0,
                               top_p=1.0, seeds=[0]) == [text]


def test_programs_and_text_have_no_edits_to_count():
    none = {"edits": 0, "hunks": 0, "malformed": 0}
    assert sample.read_program("programs", "ask", "x = 1") == ("x = 1", none)
    assert sample.read_program("text", "x = ", "1") == ("x = 1", none)


# -- The command -----------------------------------------------------------------------------------


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """(status, standard output, standard error) of sample.py with arguments, in a copy of the
    folder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = 0
        try:
            config.run(sample.main)
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return call


def test_where_the_prompt_comes_from(call, tmp_path):
    few = "--max_new_tokens=3"
    for args, stdin, prompt in (
        ((), b"", "Write f."),
        ((), "Write é.\n".encode(), "Write é."),
        (("--prompt=x",), b"y", "x"),
    ):
        status, out, err = call("--benchmark=problems.jsonl", few, *args, stdin=stdin)
        assert status == 0 and err.startswith(f"# out\n# {prompt}\n"), err
    assert call("--prompt=x", few, "--num_samples=9")[2].count("# x\n") == 1  # greedy: all alike
    status, out, err = call("--prompt=x", few, "--out=p.py", "--num_samples=2", "--temperature=1")
    assert (
        status == 0
        and out == ""
        and (tmp_path / "p.py").exists()
        and (tmp_path / "p-1.py").exists()
    )
    assert call("--prompt=x", few, "--dtype=bfloat16")[0] == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_model_that_knows_the_answer_writes_it(call, monkeypatch, terminal):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: terminal)
    status, out, err = call("--benchmark=problems.jsonl")
    assert status == 0 and out == "x = 1\nprint(x)\n"
    if terminal:
        assert "\033[36m@@ -0,0" in err and "\033[32m+x = 1" in err and err.endswith("\033[0m\n")
    else:
        assert err == f"# out\n# Write f.\n{GOOD}\n<|diff|>{MORE}\n<|diff|>\n<|diff|>\n"


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        (["--prompt=" + "x" * 150], b"", "152 tokens leave no room in the model's block_size=128"),
        (["--dtype=float16"], b"", "dtype='float16' is not auto or float32 or bfloat16"),
        (["--device=tpu"], b"", "out on tpu: "),
        (["--device=cuda:77"], b"", "out on cuda:77: "),
        (["--num_samples=0"], b"", "at least 1"),
        (["--max_new_tokens=-3"], b"", "at least 1"),
        (["--top_p=1.5"], b"", "at most 1"),
        (["--temperature=-1"], b"", "at least 0"),
        (["--seed=-1"], b"", "at least 0"),
        (["--temperature=nan"], b"", "temperature"),
        (["--edit_retries=1.5"], b"", "edit_retries"),
        (["--out=out", "--prompt=x", "--max_new_tokens=2"], b"", "-> 'out'"),  # a folder
        (["--init_from=nowhere"], b"", "nowhere on cpu: nowhere/config.json cannot be read"),
        (["--out_dir=nowhere"], b"", "nowhere on cpu: nowhere/config.json cannot be read"),
        (["--out_dir=nowhere"], b"", "; nor is there a ckpt.pt, as train.py writes it"),
        ([], b"\xff", "standard input is not UTF-8"),
        ([], b"", "from: --benchmark=data/demo-problems.jsonl"),
        (
            ["--benchmark=broken.jsonl"],
            b"",
            "broken.jsonl: no instruction in its first row (not JSON",
        ),
        (["--benchmark=other.jsonl"], b"", "other.jsonl: no instruction in its first row"),
        (
            ["--benchmark=empty.jsonl"],
            b"",
            "empty.jsonl: no instruction in its first row (it is empty)",
        ),
    ],
)
def test_what_is_wrong_is_one_line(call, tmp_path, args, stdin, message):
    (tmp_path / "broken.jsonl").write_text("{torn")
    (tmp_path / "other.jsonl").write_text('{"instruction": 3}')
    (tmp_path / "empty.jsonl").touch()
    status, out, err = call(*args, stdin=stdin)
    err = "".join(line for line in err.splitlines(True) if line.startswith("sample.py: ")) or err
    assert status in (1, 2) and message in err and err.count("\n") == 1 and out == "", err


def test_a_closed_standard_input_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # python sample.py <&-
    assert sample.find_prompt(SimpleNamespace(prompt="", benchmark=""), "text") == "def "


def test_a_torn_checkpoint_and_the_advice_that_comes_with_it(call, tmp_path):
    whole = (tmp_path / "out/ckpt.pt").read_bytes()
    whole_state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    (tmp_path / "out/ckpt.pt").write_bytes(whole[: len(whole) // 2])
    status, _, err = call("--prompt=x")
    assert status == 1 and "put out/best.pt in its place" in err and err.count("\n") == 1
    shutil.copy(tmp_path / "out/best.pt", tmp_path / "out/ckpt.pt")
    assert call("--prompt=x", "--max_new_tokens=3")[0] == 0
    (tmp_path / "out/best.pt").unlink()
    for content in (b"", b"torn", json.dumps({}).encode()):
        (tmp_path / "out/ckpt.pt").write_bytes(content)
        status, _, err = call("--prompt=x")
        assert (
            status == 1
            and "out/ckpt.pt cannot be read" in err
            and err.count("\n") == 1
            and "best" not in err
        )
    for state in (
        {},
        {"model": {}},
        {"config": {"n_layer": 1}, "model": {}, "meta": {}, "step": 1},
        whole_state | {"meta": []},
        [1],
    ):
        torch.save(state, tmp_path / "out/ckpt.pt")
        status, _, err = call("--prompt=x")
        assert (
            status == 1 and err.startswith("sample.py: out on cpu: ") and err.count("\n") == 1
        ), err


def test_a_full_disk_leaves_the_old_program(call, tmp_path, monkeypatch):
    args = ("--prompt=x", "--max_new_tokens=3", "--out=new/p.py")
    assert call(*args)[0] == 0  # the folder is made
    (tmp_path / "new/p.py").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = call(*args)
    assert status == 1 and "No space left on device" in err
    assert [p.read_text() for p in (tmp_path / "new").iterdir()] == ["old"]


def test_weights_that_are_not_finite_are_refused(call, tmp_path):
    """With a NaN the likeliest token is the first, whatever the prompt: a program all the same."""
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    for value in (float("nan"), float("inf")):
        state["model"]["blocks.0.mlp.down.weight"][3, 5] = value
        torch.save(state, tmp_path / "out/ckpt.pt")
        status, out, err = call("--prompt=x", "--max_new_tokens=3")
        assert status == 1 and "not all finite" in err and err.count("\n") == 1 and out == "", err


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(call, enc, tmp_path):
    (tmp_path / "hf").mkdir()
    model = GPT(GPTConfig(128, enc.n_vocab - 1, n_layer=1, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text(prepare.tokenizer_json(enc))
    status, out, err = call("--init_from=hf", "--prompt=x")
    assert status == 1 and err.count("\n") == 1 and out == ""
    assert f"is of another model: {enc.n_vocab} entries" in err


def test_the_tokenizer_must_be_the_one_of_the_training(call, tmp_path):
    lines = (tmp_path / "small.tiktoken").read_text().splitlines()
    (tmp_path / "small.tiktoken").write_text("\n".join(lines[:-1]))
    status, _, err = call("--prompt=x")
    assert status == 1 and "another small.tiktoken" in err and err.count("\n") == 1
    (tmp_path / "small.tiktoken").unlink()
    status, _, err = call("--prompt=x")
    assert status == 1 and "small.tiktoken" in err and err.count("\n") == 1


def test_the_display_says_what_was_taken_back(capsys):
    for coloured in (False, True):
        show = sample.make_display(coloured)
        texts = [GOOD[:n] for n in range(1, len(GOOD) + 1)] + [GOOD + "\n", GOOD + "\n<|diff|>"]
        for text in texts + [texts[-1] + MORE, texts[-1], texts[-1] + MORE + "\n+y"]:
            show(0, text)
        err = capsys.readouterr().err
        if coloured:
            assert (
                "\033[32m+x = 1" in err
                and "\n\033[35m<|diff|>\033[36m@@" in err
                and "\033[36m@@ -1" in err
            )
        else:
            assert err == GOOD + "\n<|diff|>" + MORE + "\n# again:\n" + MORE + "\n+y"
    assert lintseq.apply_edits(GOOD + "\n<|diff|>" + MORE) == "x = 1\nprint(x)"
