"""Published weights and tokenizers, both ways, against transformers and tokenizers, and through a hub on 127.0.0.1."""
import json
from pathlib import Path

import pytest
import torch

from conftest import run
from model import GPT

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


# -- Weights ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def olmo():
    torch.manual_seed(0)
    config = transformers.OlmoConfig(vocab_size=3072, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
                                     max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=1, eos_token_id=3, initializer_range=0.2)
    return transformers.OlmoForCausalLM(config).eval()


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin", "bf16", "untied", "untied copy"])
def test_every_layout_of_published_weights(olmo, tmp_path, layout):
    idx, peer = torch.randint(3072, (2, 100)), olmo
    if layout == "bf16":
        import copy
        peer = copy.deepcopy(olmo).bfloat16()
    if layout == "untied":
        peer = transformers.OlmoForCausalLM(transformers.OlmoConfig(**{**olmo.config.to_dict(), "tie_word_embeddings": False})).eval()
    if "bin" in layout or layout == "untied copy":
        peer.config.save_pretrained(tmp_path)
        state = {k: v.clone() for k, v in peer.state_dict().items()}  # with lm_head.weight, as the published file
        if layout == "untied copy":
            config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
            (tmp_path / "config.json").write_text(json.dumps(config))
        names = sorted(state)
        parts = {"pytorch_model.bin": names} if layout != "sharded bin" else {
            "pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, mine in parts.items():
            torch.save({k: state[k] for k in mine}, tmp_path / file)
        if len(parts) > 1:
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {k: f for f, mine in parts.items() for k in mine}}))
    else:
        peer.save_pretrained(tmp_path, max_shard_size="300KB" if "sharded" in layout else "5GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == ("sharded" in layout)
    model = GPT.from_pretrained(tmp_path)
    assert model.wte.weight.dtype == (torch.bfloat16 if layout == "bf16" else torch.float32)
    if layout == "bf16":
        model, peer = model.float(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = logits(peer, idx)
    assert model.config.tied == (layout != "untied")
    assert theirs.std() > 0.5 and (logits(model, idx) - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max() / 10)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert (logits(model, idx) - logits(again, idx)).abs().max() < 1e-4 * max(1, theirs.abs().max() / 10)


@pytest.mark.parametrize("key, value, message", [
    ("clip_qkv", 8.0, "clip_qkv=8.0"), ("num_key_value_heads", 2, "num_key_value_heads=2"), ("model_type", "llama", "model_type='llama'"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_type='linear'"), ("rope_parameters", None, None),
    ("attention_bias", True, "attention_bias=True"), ("num_hidden_layers", 4, r"missing tensors \['model.layers.3"),
    ("num_hidden_layers", 2, r"unknown tensors \['model.layers.2"), ("vocab_size", 3000, "not those of its config"), ("vocab_size", ..., "no 'vocab_size'"),
    ("tie_word_embeddings", False, "lm_head.weight")])
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


def test_a_published_name_samples_and_is_fetched_once(hub, olmo, neox, tmp_path, monkeypatch):
    source = tmp_path / "source"
    olmo.config.save_pretrained(source)
    torch.save({k: v.clone() for k, v in olmo.state_dict().items()}, source / "pytorch_model.bin")
    name = "upiter/TinyCodeLM-150M-LintSeqInstruct"
    for p in source.iterdir():
        hub.files[f"models/{name}/{p.name}"] = p.read_bytes()
    hub.files[f"models/{name}/tokenizer.json"] = (neox / "tokenizer.json").read_bytes()
    hub.files[f"models/{name}/training_args.bin"] = b"not wanted"
    hub.faults[f"/cdn/models/{name}/pytorch_model.bin"] = ["drop"]
    model = GPT.from_pretrained(name)
    idx = torch.randint(3072, (1, 50))
    assert (logits(model, idx) - logits(olmo, idx)).abs().max() < 1e-3
    assert not any("training_args" in path for path, _ in hub.requests)
    count = len(hub.requests)
    status, out, err = run("sample.py", f"--init_from={name}", "--prompt=Write a function", "--max_new_tokens=5", "--device=cpu", cwd=".")
    assert status == 0 and "# Write a function" in err, err
    (tmp_path / "one.jsonl").write_text(json.dumps({"task_id": 0, "entry_point": "f", "instruction": "Write f.", "test": "f()"}))
    status, out, err = run("evaluate.py", f"--init_from={name}", f"--benchmark={tmp_path / 'one.jsonl'}", "--temperatures=0",
                           "--max_new_tokens=5", "--device=cpu", cwd=".")
    assert status == 0 and f"{name}: " in out and "edits, step 0" in out, err
    assert json.loads(Path("out-eval/one/results.json").read_text())["runs"][0]["samples"] == 1
    assert len(hub.requests) == count
    import sample
    model, enc, info = sample.load_model(name, "cpu")
    assert info["form"] == "edits" and enc.eot_token == 3025
    assert sample.load_model(str(source.parent / "data/hub/models" / name), "cpu")[2]["form"] == "edits"
    status, out, err = run("sample.py", "--init_from=upiter/nothing", cwd=".")
    assert status == 1 and "404" in err and err.count("\n") == 1
