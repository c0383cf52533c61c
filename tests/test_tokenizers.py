"""Tokenizers both ways: published ones through `tokenizers`, ours exported for transformers."""
import functools
import json
import random
import resource
import sys
import unicodedata

import pytest
import torch
from conftest import call, response, run, start

import prepare
from model import GPT, GPTConfig

tokenizers = pytest.importorskip("tokenizers")
BITS = ["  ", "\n", "\n    ", "\t", " ", "\r\n", "e\u0301", "'s", "'ll", "123", " x", "def f(",
        "|||", "|||EMAIL_ADDRESS|||", "<|diff|>", "\u3000", "\x85", "\x00", "aaa", "abab", "ﬁ",
        "\u1e9b\u0323", "한국", "\u1112\u1161\u11ab"]


@functools.cache
def known_characters():
    return [c for c in map(chr, range(sys.maxunicode + 1))
            if unicodedata.category(c) not in ("Cs", "Cn", "Co")]


def random_texts(n, seed=0):
    """Texts of every kind of character that Python's Unicode knows, mixed with spaces and code."""
    rng, known = random.Random(seed), known_characters()
    draws = (lambda: rng.choice(known), lambda: rng.choice(BITS), lambda: " " * rng.randrange(60),
             lambda: chr(rng.randrange(32, 127)))
    for _ in range(n):
        yield "".join(rng.choice(draws)() for _ in range(rng.randrange(60)))


def same_ids(enc, peer, texts, *more):
    """The library's ids of the texts, which those of `enc`, and of `more` like it, equal."""
    texts = list(texts)
    theirs = [e.ids for e in peer.encode_batch(texts, add_special_tokens=False)]
    for text, ids in zip(texts, theirs):
        assert all(e.encode(text, allowed_special="all") == ids for e in (enc, *more)), text
    return theirs


def test_a_published_tokenizer_gives_the_ids_of_its_library(neox, library):
    path = str(neox / "tokenizer.json")
    enc, peer = prepare.get_tokenizer(path), tokenizers.Tokenizer.from_file(path)
    assert enc.n_vocab == peer.get_vocab_size()
    assert enc.eot_token == peer.token_to_id("<|endoftext|>")
    ids = same_ids(enc, peer, library[:120])
    assert enc.decode(ids[0]) == library[0]
    assert b"".join(map(enc.decode_single_token_bytes, ids[0])) == library[0].encode()
    assert sum(map(len, ids)) < sum(map(len, library[:120])) / 2
    same_ids(enc, peer, random_texts(1000))
    same_ids(enc, peer, ["a<|endoftext|>\u0338b", "x<|endoftext|> <|endoftext|>", "",
                         "<|padding|>  "])
    text = "one<|endoftext|>two <|diff|> |||EMAIL_ADDRESS|||"
    for ids in (enc.encode_ordinary(text), enc.encode(text)):  # text is text
        assert enc.eot_token not in ids and enc.decode(ids) == text
    prompt = prepare.encode_prompt(enc, "edits", "x")
    assert enc.decode(prompt) == "x\n<|diff|>" and prompt == enc.encode_ordinary("x\n<|diff|>")
    _, answer = prepare.encode_example(enc, "programs", "x", text)
    assert answer.index(enc.eot_token) == len(answer) - 1
    long = (library[0] + "\n" + "x" * 200_000) * 2
    assert enc.decode(prepare.encode_text(enc, long)) == long


def test_a_token_for_the_marker_is_used_where_the_file_has_one(neox, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(neox / "tokenizer.json"))
    library.add_special_tokens(["<|diff|>"])
    library.enable_truncation(5)  # a published file may have these on
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    enc = prepare.get_tokenizer(str(tmp_path / "tokenizer.json"))
    marker = library.token_to_id("<|diff|>")
    assert prepare.encode_prompt(enc, "edits", "x <|diff|>").count(marker) == 1
    assert 5 < len(enc.encode_ordinary("a b c d e f g h i j")) < 64
    assert enc.decode_single_token_bytes(marker) == b"<|diff|>" and enc.n_vocab == marker + 1


def test_fingerprints_differ_where_tokenizers_do(neox, tmp_path, library):
    prepare.train_tokenizer(tmp_path / "a.tiktoken", library[:50], 600)
    prepare.train_tokenizer(tmp_path / "b.tiktoken", library[50:100], 600)
    names = [str(neox / "tokenizer.json"), *(str(tmp_path / f"{x}.tiktoken") for x in "ab")]
    found = [prepare.fingerprint(prepare.get_tokenizer(name)) for name in names]
    assert len(set(found)) == 3 and all(len(x) == 16 for x in found)
    assert found == [prepare.fingerprint(prepare.get_tokenizer(name)) for name in names]


@pytest.mark.parametrize("text", [
    "{", '{"model": 5}', json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "▁b": 1}, "unk_token": "a"}})])
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer.json: no byte-level BPE with <\|endoftext\|>"):
        prepare.get_tokenizer(str(tmp_path / "tokenizer.json"))


def test_our_tokenizer_becomes_one_of_tokenizers_and_comes_back(tmp_path, library):
    prepare.train_tokenizer(tmp_path / "own.tiktoken", library[:200], 1500)
    enc = prepare.get_tokenizer(str(tmp_path / "own.tiktoken"))
    (tmp_path / "tokenizer.json").write_text(prepare.tokenizer_json(enc))
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back = prepare.get_tokenizer(str(tmp_path / "tokenizer.json"))
    marked = "x<|diff|>@@ -0,0 +1,2 @@\n+a = 1\n+    b<|diff|><|endoftext|>"
    for texts in (library[:60], random_texts(1000, 1), [marked]):
        same_ids(enc, peer, texts, back)
    assert back.decode(enc.encode(marked, allowed_special="all")) == marked
    assert json.loads(prepare.tokenizer_json(back)) == json.loads(prepare.tokenizer_json(enc))
    # runs of spaces that were added without training, and after end-of-text, as p50k_base's are
    ranks = dict(enc._mergeable_ranks)
    specials = {prepare.EOT: len(ranks)}
    for n in range(2, 26):
        ranks.setdefault(b" " * n, len(ranks) + 1)
    specials[prepare.DIFF] = len(ranks) + 1
    runs = prepare.tiktoken.Encoding("runs", pat_str=prepare.GPT2_PATTERN, mergeable_ranks=ranks,
                                     special_tokens=specials)
    peer = tokenizers.Tokenizer.from_str(prepare.tokenizer_json(runs))
    same_ids(runs, peer, [f"x{prepare.DIFF}{' ' * 25}x{prepare.EOT}"])
    same_ids(runs, peer, [" " * n + "x" + "\n" + " " * n for n in range(300)])
    same_ids(runs, peer, random_texts(300, 2))
    ranks = {**{bytes([n]): n for n in range(256)}, b"abc": 256}  # which no merge makes
    whole = prepare.tiktoken.Encoding("whole", pat_str=prepare.PATTERN, mergeable_ranks=ranks,
                                      special_tokens={prepare.EOT: 257, prepare.DIFF: 258})
    same_ids(whole, tokenizers.Tokenizer.from_str(prepare.tokenizer_json(whole)), ["abc ab abc"])


@pytest.fixture
def exported(workspace, tmp_path):
    """A finetuned checkpoint, as train.py writes it, of the workspace's edits; (folder, model)."""
    torch.manual_seed(1)
    meta = json.loads((workspace / "data/edits/meta.json").read_text())
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=32))
    (tmp_path / "exported").mkdir()
    (tmp_path / "tiny.tiktoken").write_bytes((workspace / "tiny.tiktoken").read_bytes())
    checkpoint = {"config": {**vars(model.config)}, "model": model.state_dict(), "meta": meta,
                  "step": 77, "settings": {"learning_rate": 0.0123, "n_layer": 12}}
    torch.save(checkpoint, tmp_path / "exported/ckpt.pt")
    return tmp_path, model


def test_export_is_read_by_transformers(workspace, exported):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    folder, model = exported
    # where evaluate.py writes without --results: a folder a benchmark
    for benchmark, mean in (("humaneval", 0.125), ("mbpp", 0.25), ("torn", None)):
        (folder / "out-eval" / benchmark).mkdir(parents=True)
        (folder / "out-eval" / benchmark / "results.json").write_text(json.dumps(
            {"runs": mean and [
                {"model": name, "temperature": 1.0, "benchmark": benchmark,
                 "correct": {"a": [8, 1], "b": [8, 1]},
                 "pass@k": {"1": {"mean": mean, "standard_error": 0.01}}}
                for name, mean in (("./exported/", mean), ("other", 0.999))]}))
    status, out, err = run("prepare.py", "--export=exported", cwd=folder)
    assert status == 0 and "out-eval/torn/results.json is not what evaluate.py writes" in out, err
    out = folder / "exported/hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__name__ == "OlmoForCausalLM"
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == 510
    idx = torch.randint(512, (2, 128))
    with torch.no_grad():
        assert (theirs(idx).logits - model(idx)[0]).abs().max() < 1e-4
    enc = prepare.get_tokenizer(str(workspace / "tiny.tiktoken"))
    for row in map(json.loads, (workspace / "edits.jsonl").open()):
        text = row["source_instruction"] + "\n<|diff|>" + response(*row["edit_path"])
        ids = tokenizer.encode(text)
        assert ids == enc.encode(text, allowed_special="all") and tokenizer.decode(ids) == text
    for text in random_texts(200, 3):
        assert tokenizer.encode(text) == enc.encode(text, allowed_special="all")
    card = (out / "README.md").read_text()
    for part in ("humaneval, 2 problems, temperature 1.0: pass@1 12.5 ± 1.0", "n_layer = 2",
                 "77 steps", "mbpp, 2 problems, temperature 1.0: pass@1 25.0 ± 1.0",
                 "must not be run without precautions", "learning_rate = 0.0123"):
        assert part in card
    assert "99.9" not in card
    import sample  # and back
    again, tokenizer = sample.load_model(str(out), "cpu")
    with torch.no_grad():
        assert torch.equal(again(idx)[0], model(idx)[0]) and again.info["form"] == "edits"
    marked = enc.encode("x<|diff|>", allowed_special="all")
    assert tokenizer.encode("x<|diff|>", allowed_special="all") == marked


def test_a_published_model_that_names_no_form_is_exported_as_one_of_text(exported):
    pytest.importorskip("safetensors")
    folder, _ = exported
    assert call("prepare.py", "--export=exported", cwd=folder)[0] == 0
    config = folder / "exported/hf/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "form": None}))
    status, _, err = call("prepare.py", "--export=exported/hf", cwd=folder)
    assert status == 0, err
    assert "It reads text and code, and continues it" in (
        folder / "exported/hf/hf/README.md").read_text()


def test_export_on_a_full_disk_leaves_the_old_weights(exported):
    pytest.importorskip("safetensors")
    folder, model = exported
    assert call("prepare.py", "--export=exported", cwd=folder)[0] == 0
    before = (folder / "exported/hf/model.safetensors").read_bytes()
    process = start("prepare.py", "--export=exported", cwd=folder, preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in err and err.count("\n") == 1, err
    assert (folder / "exported/hf/model.safetensors").read_bytes() == before


def test_export_names_what_is_torn_or_changed(exported):
    folder, _ = exported
    lines = (folder / "tiny.tiktoken").read_bytes().splitlines(keepends=True)
    (folder / "tiny.tiktoken").write_bytes(b"".join(lines[:-1]))
    status, out, err = call("prepare.py", "--export=exported", cwd=folder)
    assert status == 1 and "another tiny.tiktoken: put the old file back" in err
    (folder / "tiny.tiktoken").unlink()
    status, out, err = call("prepare.py", "--export=exported", cwd=folder)
    assert status == 1 and "tiny.tiktoken" in err and err.count("\n") == 1
    (folder / "exported/ckpt.pt").write_bytes(b"torn")
    status, out, err = call("prepare.py", "--export=exported", cwd=folder)
    assert status == 1 and "its ckpt.pt, or the tokenizer in that, cannot be read" in err
    assert err.count("\n") == 1
