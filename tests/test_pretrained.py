"""Published weights and tokenizers, both ways, against transformers and tokenizers, and through a hub on 127.0.0.1."""
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import prepare
from conftest import ROOT, run
from model import GPT, GPTConfig
from test_prepare import hub  # noqa: F401  (a fixture)

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def library():
    return [text for _, text in prepare.documents("stdlib") if text]


@pytest.fixture(scope="module")
def neox(tmp_path_factory, library):
    """A tokenizer.json made as GPT-NeoX's and OLMo's: NFC, ByteLevel, runs of spaces and masks as added tokens."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, special_tokens=["|||IP_ADDRESS|||", "<|padding|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(library[:250] + ["東京 café naïve 🙂 Ελληνικά русский"] * 50, trainer)
    t.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    t.add_tokens([tokenizers.AddedToken(m, normalized=False) for m in ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||")])
    t.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("neox")
    t.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"][0]["special"] = False  # the mask at 0 is no special token in OLMo's
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def random_texts(n, seed=0):
    """Texts of every kind of character that Python's Unicode knows, mixed with spaces, marks and bits of code."""
    rng = random.Random(seed)
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    marks = [c for c in known if unicodedata.combining(c)]
    bits = ["  ", "\n", "\n    ", "\t", " ", "\r\n", "e\u0301", "'s", "'ll", "123", " x", "def f(", "|||EMAIL_ADDRESS|||", "<|diff|>",
            "|||", "\u3000", "\x85", "\x00", "aaa", "abab", "ﬁ", "\u1e9b\u0323", "한국", "\u1112\u1161\u11ab"]
    for _ in range(n):
        yield "".join(rng.choice((lambda: rng.choice(known), lambda: rng.choice(marks), lambda: rng.choice(bits),
                                  lambda: " " * rng.randrange(60), lambda: chr(rng.randrange(32, 127))))() for _ in range(rng.randrange(60)))


def marked_texts():
    """Every mark next to marks of other classes, and every pair that composes: what NFC puts in another order or joins."""
    for c in map(chr, range(sys.maxunicode + 1)):
        parts = unicodedata.decomposition(c).split()
        if unicodedata.combining(c):
            yield from (f"a{x}{y}" for other in "\u0301\u0316\u0345\u0334\u1dce" for x, y in ((c, other), (other, c)))
        elif parts and "<" not in parts[0]:
            yield c + "".join(chr(int(x, 16)) for x in parts)


def same_ids(enc, peer, texts):
    texts = list(texts)
    theirs = [e.ids for e in peer.encode_batch(texts, add_special_tokens=False)]
    for text, ids in zip(texts, theirs):
        assert enc.encode(text, allowed_special="all") == ids, text
    return theirs


def test_neox_tokenizer_gives_the_ids_of_tokenizers(neox, library):
    enc, peer = prepare.get_tokenizer(str(neox / "tokenizer.json")), tokenizers.Tokenizer.from_file(str(neox / "tokenizer.json"))
    assert enc.n_vocab == peer.get_vocab_size() and enc.eot_token == peer.token_to_id("<|endoftext|>")
    ids = same_ids(enc, peer, library)
    assert sum(map(len, ids)) < sum(map(len, library)) / 2 and enc.decode(ids[0]) == library[0]
    same_ids(enc, peer, random_texts(3000))
    same_ids(enc, peer, marked_texts())
    same_ids(enc, peer, ["a<|endoftext|>\u0338b", "x<|endoftext|> <|endoftext|>", "", " ", "<|padding|>  ", "|||IP_ADDRESS|||\u0301"])
    letters = random.Random(1)
    same_ids(enc, peer, ("".join(letters.choices("aeinst r", k=40)) for _ in range(3000)))
    text = "one<|endoftext|>two"
    assert enc.eot_token not in enc.encode_ordinary(text) and enc.decode(enc.encode_ordinary(text)) == text
    assert enc.encode_ordinary_batch([text, library[0]]) == [enc.encode_ordinary(text), ids[0]]
    with pytest.raises(ValueError, match="endoftext"):
        enc.encode(text)


@pytest.mark.parametrize("change, message", [
    (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda d: d["added_tokens"][-1].update(rstrip=True), "rstrip of '<|endoftext|>'"),
    (lambda d: d["model"].update(type="Unigram"), "Unigram"),
    (lambda d: d["model"].update(dropout=0.1), "dropout"),
    (lambda d: d["model"]["merges"].reverse(), "merges"),
    (lambda d: d["model"]["merges"].pop(40), "merges"),
])
def test_tokenizers_of_another_kind_are_refused(neox, tmp_path, change, message):
    data = json.loads((neox / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        prepare.get_tokenizer(str(tmp_path / "tokenizer.json"))


def test_our_tokenizer_becomes_one_of_tokenizers_and_comes_back(tmp_path, library):
    prepare.train_tokenizer(tmp_path / "own.tiktoken", library[:200], 1500)
    enc = prepare.get_tokenizer(str(tmp_path / "own.tiktoken"))
    (tmp_path / "tokenizer.json").write_text(prepare.tokenizer_json(enc))
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back = prepare.get_tokenizer(str(tmp_path / "tokenizer.json"))
    for texts in (library[:120], random_texts(3000, 1), ["x<|diff|>@@ -0,0 +1,2 @@\n+a = 1\n+    b<|diff|><|endoftext|>"]):
        texts = list(texts)
        same_ids(enc, peer, texts)
        same_ids(back, peer, texts)
    # runs of spaces that were added without training, and after end-of-text, as p50k_base's are
    ranks = dict(enc._mergeable_ranks)
    specials = {prepare.EOT: len(ranks)}
    for n in range(2, 26):
        ranks.setdefault(b" " * n, len(ranks) + 1)
    specials[prepare.DIFF] = len(ranks) + 1
    runs = prepare.tiktoken.Encoding("runs", pat_str=prepare.GPT2, mergeable_ranks=ranks, special_tokens=specials)
    peer = tokenizers.Tokenizer.from_str(prepare.tokenizer_json(runs))
    same_ids(runs, peer, [f"x{prepare.DIFF}{' ' * 25}x{prepare.EOT}"])
    same_ids(runs, peer, [" " * n + "x" + "\n" + " " * n for n in range(300)] + list(random_texts(1000, 2)))


# -- Weights ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def olmo():
    torch.manual_seed(0)
    config = transformers.OlmoConfig(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=1,
        eos_token_id=3,
        initializer_range=0.2,
    )
    return transformers.OlmoForCausalLM(config).eval()


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize(
    "layout",
    ["safetensors", "sharded safetensors", "bin", "sharded bin", "bf16", "untied", "untied copy"],
)
def test_every_layout_of_published_weights(olmo, tmp_path, layout):
    idx, peer = torch.randint(3072, (2, 100)), olmo
    if layout == "bf16":
        import copy

        peer = copy.deepcopy(olmo).bfloat16()
    if layout == "untied":
        peer = transformers.OlmoForCausalLM(
            transformers.OlmoConfig(**{**olmo.config.to_dict(), "tie_word_embeddings": False})
        ).eval()
    if "bin" in layout or layout == "untied copy":
        peer.config.save_pretrained(tmp_path)
        state = {
            k: v.clone() for k, v in peer.state_dict().items()
        }  # with lm_head.weight, as the published file
        if layout == "untied copy":
            config = json.loads((tmp_path / "config.json").read_text()) | {
                "tie_word_embeddings": False
            }
            (tmp_path / "config.json").write_text(json.dumps(config))
        names = sorted(state)
        parts = (
            {"pytorch_model.bin": names}
            if layout != "sharded bin"
            else {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        )
        for file, mine in parts.items():
            torch.save({k: state[k] for k in mine}, tmp_path / file)
        if len(parts) > 1:
            (tmp_path / "pytorch_model.bin.index.json").write_text(
                json.dumps({"weight_map": {k: f for f, mine in parts.items() for k in mine}})
            )
    else:
        peer.save_pretrained(tmp_path, max_shard_size="300KB" if "sharded" in layout else "5GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == ("sharded" in layout)
    model = GPT.from_pretrained(tmp_path)
    assert model.wte.weight.dtype == (torch.bfloat16 if layout == "bf16" else torch.float32)
    if layout == "bf16":
        model, peer = model.float(), transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32
        )
    theirs = logits(peer, idx)
    assert model.config.tied == (layout != "untied")
    assert theirs.std() > 0.5 and (logits(model, idx) - theirs).abs().max() < 1e-4 * max(
        1, theirs.abs().max() / 10
    )
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    assert (logits(model, idx) - logits(again, idx)).abs().max() < 1e-4 * max(
        1, theirs.abs().max() / 10
    )


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("clip_qkv", 8.0, "clip_qkv=8.0"),
        ("num_key_value_heads", 2, "num_key_value_heads=2"),
        ("model_type", "llama", "model_type='llama'"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "rope_type='linear'",
        ),
        ("rope_parameters", None, None),
        ("attention_bias", True, "attention_bias=True"),
        ("num_hidden_layers", 4, "missing or unknown: model.layers.3"),
        ("num_hidden_layers", 2, "missing or unknown: model.layers.2"),
        ("vocab_size", 3000, "not those of its config"),
        ("vocab_size", ..., "vocab_size=None"),
        ("hidden_size", "64", "hidden_size='64'"),
        ("tie_word_embeddings", False, "lm_head.weight"),
    ],
)
def test_what_is_not_supported_is_named(olmo, tmp_path, key, value, message):
    olmo.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = value
    config = {k: v for k, v in config.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message:
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
    else:
        GPT.from_pretrained(tmp_path)


def test_pickles_with_code_and_torn_files_are_refused(olmo, tmp_path):
    olmo.config.save_pretrained(tmp_path)
    torch.save({"model.embed_tokens.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{torn")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)


def test_a_published_name_samples_and_is_fetched_once(hub, olmo, tmp_path):
    if not hasattr(hub, "COMMIT"):
        pytest.skip("this hub does not speak huggingface_hub's language")
    name, source = "upiter/TinyCodeLM-150M-LintSeqInstruct", tmp_path / "source"
    olmo.config.save_pretrained(source)
    torch.save({k: v.clone() for k, v in olmo.state_dict().items()}, source / "pytorch_model.bin")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        ["def f(x):\n    return x\n"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    library.save(str(source / "tokenizer.json"))
    for path in source.iterdir():
        hub.files[f"models/{name}/{path.name}"] = path.read_bytes()
    hub.files[f"models/{name}/training_args.bin"] = hub.files[f"models/{name}/old/config.json"] = (
        b"not wanted"
    )
    args = (
        "sample.py",
        f"--init_from={name}",
        "--prompt=Write a function",
        "--max_new_tokens=5",
        "--device=cpu",
    )
    status, out, err = run(*args, cwd=".")
    assert status == 0 and "# Write a function" in err, err
    assert not any("training_args" in path or "old" in path for _, path, _ in hub.requests)
    sent = dict(hub.sent)
    code = (
        f"from model import GPT; import torch; torch.save(GPT.from_pretrained('{name}').state_dict(), 'got.pt');"
        f"import sample; assert sample.load_model('{name}', 'cpu')[2]['form'] == 'edits'"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert (
        torch.equal(torch.load("got.pt")["wte.weight"], olmo.model.embed_tokens.weight)
        and hub.sent == sent
    )
    status, out, err = run("sample.py", "--init_from=upiter/nothing", cwd=".")
    last = err.splitlines()[-1]
    assert status == 1 and "upiter/nothing" in last and "404" in last and "Traceback" not in err
    hub.token = "hf_secret"
    hub.files["models/owner/gated/config.json"] = b"{}"
    status, out, err = run("sample.py", "--init_from=owner/gated", cwd=".")
    assert status == 1 and "401" in err.splitlines()[-1] and "Traceback" not in err
    hub.server.shutdown()
    hub.server.server_close()
    status, out, err = run(*args, cwd=".")  # from the cache, without a network
    assert status == 0, err
    status, out, err = run("sample.py", "--init_from=upiter/nothing", cwd=".")
    assert status == 1 and "upiter/nothing" in err.splitlines()[-1] and "Traceback" not in err


def test_without_the_libraries_their_names_are_given(tmp_path):
    GPT(GPTConfig(8, 64, 1, 1, 8)).save_pretrained(tmp_path / "small")
    for library, name in (("huggingface_hub", "owner/name"), ("safetensors", "small")):
        code = f"import sys; sys.modules['{library}'] = None; import config, sample; config.run(sample.main)"
        process = subprocess.run(
            [sys.executable, "-c", code, f"--init_from={name}", "--prompt=x"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 1 and process.stderr.count("\n") == 1
        assert f"pip install {library}" in process.stderr


def test_export_is_read_by_transformers(workspace, tmp_path):
    """A finetuned checkpoint, as train.py writes it, to a folder that AutoModelForCausalLM and AutoTokenizer load."""
    torch.manual_seed(1)
    folder, name = workspace, "exported"
    meta = json.loads((folder / "data/edits/meta.json").read_text())
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=32))
    (folder / name).mkdir()
    torch.save({"config": {**vars(model.config)}, "model": model.state_dict(), "meta": meta, "step": 77, "settings": {"learning_rate": 0.0123}},
               folder / name / "ckpt.pt")
    (folder / "scores").mkdir()
    (folder / "scores/results.json").write_text(json.dumps({"benchmark": "humaneval", "runs": [
        {"model": name, "temperature": 1.0, "pass@k": {"1": {"mean": 0.125, "standard_error": 0.01}}},
        {"model": "other", "temperature": 0.0, "pass@k": {"1": {"mean": 0.999, "standard_error": 0.01}}}]}))
    status, out, err = run("prepare.py", f"--export={name}", "--results=scores", cwd=folder)
    assert status == 0, err
    out = folder / name / "hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__name__ == "OlmoForCausalLM" and theirs.config.eos_token_id == tokenizer.eos_token_id == 510
    idx = torch.randint(512, (2, 128))
    assert (logits(theirs, idx) - logits(model, idx)).abs().max() < 1e-4
    enc = prepare.get_tokenizer(str(folder / "tiny.tiktoken"))
    for row in map(json.loads, (folder / "edits.jsonl").open()):
        text = row["source_instruction"] + "\n<|diff|>" + "\n<|diff|>".join(row["edit_path"]) + "<|endoftext|>"
        ids = tokenizer.encode(text)
        assert ids == enc.encode(text, allowed_special="all") and tokenizer.decode(ids) == text
    for text in random_texts(200, 3):
        assert tokenizer.encode(text) == enc.encode(text, allowed_special="all")
    card = (out / "README.md").read_text()
    for part in ("12.5 ± 1.0", "must not be run without precautions", "learning_rate = 0.0123", "77 steps", "n_layer = 2"):
        assert part in card
    assert "99.9" not in card
    # and back
    import sample
    again, tokenizer, info = sample.load_model(str(out), "cpu")
    assert torch.equal(logits(again, idx), logits(model, idx)) and info["form"] == "edits"
    assert tokenizer.encode("x<|diff|>", allowed_special="all") == enc.encode("x<|diff|>", allowed_special="all")
