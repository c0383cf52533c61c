"""Published weights, both ways, against transformers, and through a hub on 127.0.0.1."""
import json
import shutil
import sys

import pytest
import torch
from conftest import call, run

import sample
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


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
        ("rope_parameters", {"type": "linear", "factor": 2.0}, "not supported: type='linear'"),
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


def test_a_published_name_samples_and_is_fetched_once(hub, olmo, neox, tmp_path):
    name, source = "upiter/TinyCodeLM-150M-LintSeqInstruct", tmp_path / "source"
    olmo.config.save_pretrained(source)
    torch.save({k: v.clone() for k, v in olmo.state_dict().items()}, source / "pytorch_model.bin")
    shutil.copy(neox / "tokenizer.json", source)
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
    model = GPT.from_pretrained(name)
    assert torch.equal(model.wte.weight, olmo.model.embed_tokens.weight)
    assert sample.load_model(name, "cpu")[0].info["form"] == "edits" and hub.sent == sent
    status, out, err = call("sample.py", "--init_from=upiter/nothing", cwd=".")
    last = err.splitlines()[-1]
    assert status == 1 and "upiter/nothing" in last and "404" in last and "Traceback" not in err
    hub.token = "hf_secret"
    hub.files["models/owner/gated/config.json"] = b"{}"
    status, out, err = call("sample.py", "--init_from=owner/gated", cwd=".")
    assert status == 1 and "401" in err.splitlines()[-1] and "Traceback" not in err
    hub.server.shutdown()
    hub.server.server_close()
    status, out, err = call(*args, cwd=".")  # from the cache, without a network
    assert status == 0, err
    status, out, err = call("sample.py", "--init_from=upiter/nothing", cwd=".")
    assert status == 1 and "upiter/nothing" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    "library, name", [("huggingface_hub", "owner/name"), ("safetensors", "small")]
)
def test_without_the_libraries_their_names_are_given(tmp_path, monkeypatch, library, name):
    GPT(GPTConfig(8, 64, 1, 1, 8)).save_pretrained(tmp_path / "small")
    for module in [m for m in sys.modules if m.startswith(library + ".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    status, _, err = call("sample.py", f"--init_from={name}", "--prompt=x", cwd=tmp_path)
    assert status == 1 and err.count("\n") == 1 and f"pip install {library}" in err
