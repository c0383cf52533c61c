"""The model: GPT-2's shapes with OLMo's changes (TinyCodeLM, arXiv 2410.02749), in one file.

Against GPT-2: no biases, LayerNorm without weight or bias, SwiGLU, rotary positions, tied embeddings, no dropout.
The same function as Hugging Face's `OlmoForCausalLM`; `from_pretrained` and `save_pretrained` speak its format.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))     # 151,879,680 parameters: the paper's 150M
    logits, _ = model(idx)                                        # (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)                                 # next-token cross-entropy
    tokens = model.generate([[1, 2, 3], [4]], max_new_tokens=20)  # any number of prompts, of any lengths

Left out: dropout and grouped heads (the paper has none), tensor parallelism (the models fit any GPU).
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50304  # rows of the embedding: the tokenizer's entries, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_hidden: int = 0  # width of SwiGLU; 0: 4 * n_embd, as published
    rope_theta: float = 10000.0
    tied: bool = True  # the output layer is the embedding

    def __post_init__(self):
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even number (rotary pairs)")


class Rotate(torch.autograd.Function):
    """Rotary positions in the rotate-half layout. x: (..., T, D); cos, sin: broadcastable to (..., T, D / 2). Its gradient
    is the rotation back: written out, it takes a third of the passes over memory that autograd's would."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, dim=-1)
        return torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), dim=-1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        a, b = grad.chunk(2, dim=-1)
        return torch.cat(((a * cos).addcmul_(b, sin), (b * cos).addcmul_(a, sin, value=-1)), dim=-1), None, None


class SiluTimes(torch.autograd.Function):
    """silu(gate) * up of (..., 2 * n_hidden), gate and up side by side; keeps its input alone for the gradient."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # rows: all of q, all of k, all of v
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        """x: (B, T, C). mask: (B, 1, T, S) bool, None is causal. cache: None, or (k, v, rows, positions) with
        k, v: (slots, H, S, D); this call's keys go to k[rows, :, positions] and, with a mask, it attends to k[rows]."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        q, k = Rotate.apply(q, *rope), Rotate.apply(k, *rope)
        if cache is not None:
            keys, values, rows, positions = cache
            keys[rows[:, None], :, positions] = k.transpose(1, 2).to(keys.dtype)  # (B, T, H, D)
            values[rows[:, None], :, positions] = v.transpose(1, 2).to(keys.dtype)
            if mask is not None:  # a decoding step: rows are all slots, in order
                k, v = keys[:, :, :mask.size(-1)], values[:, :, :mask.size(-1)]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)  # rows: all of gate, all of up
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(SiluTimes.apply(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.attn(norm(x), rope, mask, cache)
        return x + self.mlp(norm(x))


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class FusedCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross-entropy(x @ weight.T, targets), a chunk of rows at a time: the logits of a whole batch
    (16 x 1024 x 50304 in float32 is 3.3 GB) are never held, for the gradient is taken while a chunk is at hand."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, training):
        # x: (N, C), weight: (V, C), targets: (N,) with -1 where there is no loss
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        w, total = weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(x), chunk):
            xs, ts = x[i:i + chunk].to(dtype), targets[i:i + chunk]
            keep, ts = (ts >= 0)[:, None], ts.clamp(min=0)[:, None]
            logits = (xs @ w.t()).float()
            logp = torch.log_softmax(logits, -1, out=logits) if logits.device.type == "cpu" else logits.log_softmax(-1)
            total -= (logp.gather(1, ts) * keep).sum()
            if not training:
                continue
            grad = logp.exp_().scatter_add_(1, ts, torch.full_like(logp[:, :1], -1.0)).to(dtype)  # of the logits, if kept
            grad_x[i:i + chunk] = (grad @ w) * keep
            xs = xs * keep
            grad_w.addmm_(grad.t(), xs) if dtype == torch.float32 else grad_w.add_(grad.t() @ xs)
        ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(upstream), grad_w.mul_(upstream), None, None, None  # in place: it is asked for once


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        freqs = config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angles = torch.arange(config.block_size, dtype=torch.float64, device="cpu")[:, None] * freqs  # (T, D / 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, p in self.named_parameters():  # GPT-2's: the residual stream adds up 2 * n_layer outputs
            scale = 1 / math.sqrt(2 * config.n_layer) if name.endswith(("proj.weight", "down.weight")) else 1.0
            nn.init.normal_(p, std=0.02 * scale)

    @property
    def head(self):
        """The output layer's weight, (vocab_size, C)."""
        return self.lm_head.weight if self.lm_head else self.wte.weight

    def num_params(self):
        """All parameters, the tied embedding once: 151,879,680 and 454,164,480 at the paper's two shapes."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length):
        """Training FLOPs a token of a sequence of `length`: 6 for each weight that multiplies (every matrix; the tied
        embedding counts once, as the output layer: the look-up is free), and 12 * n_layer * n_embd * length / 2 for
        causal attention (queries x keys and weights x values, forward and twice that backward)."""
        matrices = self.num_params() - (0 if self.config.tied else self.wte.weight.numel())
        return 6 * matrices + 6 * self.config.n_layer * self.config.n_embd * length

    def forward(self, idx, targets=None, segments=None):
        """idx: (B, T) int64, T <= block_size. Returns (logits, loss).

        Without targets: logits (B, T, vocab_size), loss None. With targets (B, T), -1 where there is no loss: logits
        None (they are never held whole), loss the mean over the rest. segments: (B, T) ints, for several examples
        packed into one row: a token attends to its own segment only. Rotary attention knows nothing but differences
        of positions, so a packed example sees just what it sees alone."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        mask = None
        if segments is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
            mask = ((segments[:, None, :, None] == segments[:, None, None, :]) & causal)  # (B, 1, T, T)
        x = self.hidden(idx, (self.cos[:T], self.sin[:T]), mask)
        if targets is None:
            return F.linear(x, self.head), None
        chunk = max(256, 2 ** 26 // self.config.vocab_size)  # rows whose logits fill about 256 MB in float32
        total = FusedCrossEntropy.apply(x.reshape(B * T, -1), self.head, targets.reshape(-1), chunk,
                                        torch.is_grad_enabled())
        return None, total / (targets >= 0).sum().clamp(min=1)

    def hidden(self, idx, rope, mask=None, caches=None):
        """The final norm's output, (B, T, C)."""
        x, rope = self.wte(idx), tuple(r.to(self.wte.weight.dtype) for r in rope)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, caches and caches[i])
        return norm(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, *, temperature=1.0, top_p=1.0, seeds=None, stop_tokens=(), stop=None,
                 accept=None, batch_size=64, on_token=None):
        """Continue every prompt; returns one list of new tokens each, without the stop token that ended it.

        prompts: lists of token ids, none empty, of any lengths. temperature 0 is argmax; else the nucleus of
        probability `top_p` is sampled from, by one uniform number a token drawn from the row's own seed
        (`seeds`: ints, default 0, 1, ...), so that a sample does not depend on what shares its batch. A row ends at a
        token of `stop_tokens`, when `stop(new_tokens)` is true, after max_new_tokens, or at block_size; its place
        goes to the next prompt. `on_token(i, token)` is called as prompt i's tokens come, with None at its end.
        `accept(i, new, token)` is asked before `token` joins prompt i's list of new tokens: None takes it; False has
        another one drawn in its place; a list becomes the new tokens (what it shares with the old ones stays cached,
        the rest is fed). After a list that is no longer than `new`, tokens are drawn at temperature 1 even if
        `temperature` is 0, until a longer one comes; on_token hears of removed tokens as a negative number of them.
        Keys and values are cached: each token costs one row of one forward pass. ValueError on an empty prompt or one
        that fills block_size."""
        device, dtype, S = self.wte.weight.device, self.wte.weight.dtype, self.config.block_size
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < S:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; it must have 1 to {S - 1} (block_size={S})")
        longest = min(S, max(map(len, prompts), default=0) + max_new_tokens)
        B, H = min(batch_size, len(prompts)), self.config.n_head
        shape = (B, H, longest, self.config.n_embd // H)
        caches = [(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
                  for _ in self.blocks]
        outputs, waiting = [[] for _ in prompts], list(range(len(prompts)))[::-1]
        owner = [None] * B  # which prompt each slot of the batch works on
        uniforms, randoms = torch.zeros(B, max_new_tokens), [None] * B  # each slot's random numbers, one a token
        tokens, lengths = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)  # last token, cached
        again, feed = set(), [[] for _ in range(B)]  # slots that draw a cut part again; tokens that are not to be drawn

        def take(slots, logits):
            """Sample a token for each of `slots` from logits (len(slots), V); free the slots whose row ended."""
            u = torch.stack([uniforms[s, len(outputs[owner[s]])] for s in slots]) if temperature or again else None
            drawn = sample_tokens(logits, temperature, top_p, u).tolist()
            for r, (s, token) in enumerate(zip(slots, drawn)):
                i, row = owner[s], logits[r:r + 1]
                new, keep, refused = outputs[i], None, 0
                if feed[s]:
                    token = feed[s].pop(0)
                else:
                    if s in again and not temperature:
                        token = sample_tokens(row, 1.0, top_p, u[r:r + 1]).item()
                    keep = accept(i, new, token) if accept else None
                while keep is False:  # refusing until one is taken draws from what may be taken, exactly
                    row[0, token], refused = -math.inf, refused + 1
                    if row.max() == -math.inf:
                        token, keep = None, None
                        break
                    hot = (temperature or s in again) and refused < 64  # or the best that is left
                    token = sample_tokens(row, (temperature or 1.0) if hot else 0, top_p, torch.rand(
                        1, generator=randoms[s])).item()
                    keep = accept(i, new, token)
                if keep is not None and keep != new + [token]:
                    same = next((k for k, (x, y) in enumerate(zip(new, keep)) if x != y), min(len(new), len(keep)))
                    if len(keep) <= len(new):
                        uniforms[s] = torch.rand(max_new_tokens, generator=randoms[s])
                        again.add(s)
                    else:
                        again.discard(s)
                    if on_token and same < len(new):
                        on_token(i, same - len(new))
                    del new[same:]
                    feed[s] = keep[same:]
                    if not feed[s]:  # back to there: the cache past it is overwritten before it is seen
                        tokens[s], lengths[s] = (prompts[i] + new)[-1], len(prompts[i]) + same - 1
                        continue
                    token = feed[s].pop(0)
                    lengths[s] = len(prompts[i]) + same
                elif keep is not None:
                    again.discard(s)
                ended = token is None or token in stop_tokens
                if not ended:
                    tokens[s] = token
                    new.append(token)
                    if on_token:
                        on_token(i, token)
                    ended = (len(new) == max_new_tokens or len(prompts[i]) + len(new) >= S or bool(stop and stop(new)))
                if ended:
                    owner[s], lengths[s], feed[s] = None, 0, []  # an idle slot computes one masked position, in vain
                    again.discard(s)
                    if on_token:
                        on_token(i, None)

        while waiting and max_new_tokens or any(o is not None for o in owner):
            free = [s for s in range(B) if owner[s] is None]
            if waiting and len(free) >= min(len(waiting), max(1, B // 8)):  # a few at a time: prefill in batches
                slots = free[:len(waiting)]
                for s in slots:
                    owner[s] = i = waiting.pop()
                    lengths[s] = len(prompts[i])
                    randoms[s] = torch.Generator().manual_seed(seeds[i] if seeds is not None else i)
                    uniforms[s] = torch.rand(max_new_tokens, generator=randoms[s])
                T = max(len(prompts[owner[s]]) for s in slots)
                # Padded on the right: causal attention keeps the padding from every real token, and decoding
                # overwrites its keys before the mask lets anyone see them.
                idx = torch.tensor([prompts[owner[s]] + [0] * (T - len(prompts[owner[s]])) for s in slots])
                rows, positions = torch.tensor(slots, device=device), torch.arange(T, device=device)[None]
                x = self.hidden(idx.to(device), (self.cos[:T], self.sin[:T]), None,
                                [(*c, rows, positions) for c in caches])
                last = (lengths[slots] - 1).to(device)
                take(slots, F.linear(x[torch.arange(len(slots), device=device), last], self.head).float())
                continue
            active = [s for s in range(B) if owner[s] is not None]
            at = lengths.to(device)[:, None]  # (B, 1): where this step's key goes
            seen = torch.arange(int(lengths.max()) + 1, device=device) <= at  # (B, S)
            x = self.hidden(tokens.to(device)[:, None], (self.cos[at][:, None], self.sin[at][:, None]),
                            seen[:, None, None], [(*c, torch.arange(B, device=device), at) for c in caches])
            lengths[active] += 1
            take(active, F.linear(x[active, 0], self.head).float())
        return outputs

    # -- Hugging Face's OlmoForCausalLM -------------------------------------------------------------------------------

    def save_pretrained(self, folder, **extra):
        """Write config.json and model.safetensors into `folder`, for transformers' `AutoModelForCausalLM`.
        extra: more keys of config.json, such as eos_token_id (prepare.py --export adds the tokenizer and a card)."""
        save_file = safetensors().save_file
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(architectures=["OlmoForCausalLM"], model_type="olmo", vocab_size=c.vocab_size,
                      hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
                      num_attention_heads=c.n_head, num_key_value_heads=c.n_head, hidden_act="silu",
                      max_position_embeddings=c.block_size, rope_theta=c.rope_theta, attention_bias=False,
                      tie_word_embeddings=c.tied, clip_qkv=None, pad_token_id=None, bos_token_id=None,
                      eos_token_id=None, torch_dtype=str(self.wte.weight.dtype).split(".")[1]) | extra
        state, tensors = self.state_dict(), {}
        for name, (own, part, parts) in olmo_names(c).items():
            tensors[name] = state[own].chunk(parts)[part].contiguous()
        save_file(tensors, str(folder / "model.safetensors.tmp"), metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name):
        """A model from a folder or from the Hugging Face hub ("upiter/TinyCodeLM-150M"): our own `ckpt.pt`, or
        config.json with model.safetensors or pytorch_model.bin, whole or in shards with an index; float32 or bf16,
        which it keeps. OSError or ValueError, with what is missing or not supported."""
        folder = Path(name)
        if not folder.is_dir() and str(name).count("/") == 1 and not str(name).startswith((".", "/")):
            from prepare import hub_model  # the one import of ours: downloads are its job
            folder = hub_model(str(name))
        if (folder / "ckpt.pt").is_file():
            return cls.from_checkpoint(torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True, mmap=True))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds neither ckpt.pt nor config.json")
        hf = json.loads((folder / "config.json").read_text())
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        wrong = [f"{k}={hf.get(k)!r}" for k, good in (
            ("model_type", ("olmo",)), ("clip_qkv", (None,)), ("attention_bias", (False, None)),
            ("hidden_act", ("silu", None)), ("num_key_value_heads", (hf.get("num_attention_heads"), None)))
            if hf.get(k) not in good]
        wrong += [f"rope {k}={v!r}" for k, v in rope.items() if k != "rope_theta" and v not in ("default", 1.0, None)]
        if wrong:
            raise ValueError(f"{folder}/config.json: not supported: {', '.join(wrong)}")
        try:
            config = GPTConfig(hf["max_position_embeddings"], hf["vocab_size"], hf["num_hidden_layers"],
                               hf["num_attention_heads"], hf["hidden_size"], hf["intermediate_size"],
                               float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0))
        except KeyError as e:
            raise ValueError(f"{folder}/config.json has no {e}") from None
        tensors, tie = load_tensors(folder), hf.get("tie_word_embeddings")
        head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        config.tied = tie is not False if head is None else bool(tie) or embedding is not None and torch.equal(head, embedding)
        if config.tied:
            tensors.pop("lm_head.weight", None)
        names = olmo_names(config)
        if set(tensors) != set(names):
            raise ValueError(f"{folder}: missing tensors {sorted(set(names) - set(tensors))}, "
                             f"unknown tensors {sorted(set(tensors) - set(names))}")
        own = {}
        for name, (key, part, parts) in names.items():
            own.setdefault(key, [None] * parts)[part] = tensors[name]
        try:
            return cls.from_checkpoint({"config": asdict(config), "model": {k: torch.cat(v) for k, v in own.items()}})
        except RuntimeError as e:  # shapes
            raise ValueError(f"{folder}: its tensors are not those of its config.json: {e}") from None

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """A model from what train.py saves: a dict with `config` (GPTConfig's fields) and `model` (a state dict).
        Its weights keep the dtype they were stored in."""
        with torch.device("meta"):  # no time spent on weights that are replaced at once
            model = cls(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"], assign=True)
        return model


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("safetensors files need: pip install safetensors") from None
    return safetensors.torch


def load_tensors(folder):
    """{name: tensor} of model.safetensors or pytorch_model.bin, or of the shards that their index lists."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if not (folder / kind).is_file() and not index.is_file():
            continue
        files = [kind] if (folder / kind).is_file() else sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tensors = {}
        for file in files:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file} is missing, and {index.name} lists it")
            try:
                tensors |= safetensors().load_file(folder / file) if kind.endswith("safetensors") else torch.load(
                    folder / file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as e:
                raise ValueError(f"{folder / file} cannot be read: {(str(e).splitlines() or [type(e).__name__])[0]}") from None
        return tensors
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def olmo_names(config):
    """{Hugging Face's tensor name: (ours, part, parts)}: theirs is the part-th of `parts` equal pieces of our rows."""
    names = {"model.embed_tokens.weight": ("wte.weight", 0, 1)}
    if not config.tied:
        names["lm_head.weight"] = ("lm_head.weight", 0, 1)
    for i in range(config.n_layer):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        for part, kind in enumerate("qkv"):
            names[f"{theirs}self_attn.{kind}_proj.weight"] = (f"{ours}attn.qkv.weight", part, 3)
        names[f"{theirs}self_attn.o_proj.weight"] = (f"{ours}attn.proj.weight", 0, 1)
        for part, kind in enumerate(("gate", "up")):
            names[f"{theirs}mlp.{kind}_proj.weight"] = (f"{ours}mlp.gate_up.weight", part, 2)
        names[f"{theirs}mlp.down_proj.weight"] = (f"{ours}mlp.down.weight", 0, 1)
    return names


def sample_tokens(logits, temperature, top_p, u):
    """One token a row. logits: (B, V) float32; u: (B,) uniform in [0, 1), or None at temperature 0 (argmax).
    The inverse of the cumulative distribution over the nucleus: the fewest likeliest tokens that hold top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    u = u.to(logits.device)[:, None] * cumulative[:, -1:]
    pick = torch.searchsorted(cumulative, u, right=True).clamp(max=p.size(-1) - 1)
    return (pick if order is None else order.gather(1, pick)).squeeze(1)
