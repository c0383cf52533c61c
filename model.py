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
from random import Random
from types import SimpleNamespace

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages: a CPU reads weights a seventh faster

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
    """Rotary positions in the rotate-half layout. x: (..., T, D); cos, sin: broadcastable to it, the first half of sin
    negative. Its gradient is the rotation back: written out, it takes a third of autograd's passes over memory."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(grad.roll(grad.size(-1) // 2, -1), sin, value=-1), None, None


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
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        qk, v = qkv.split((2, 1))
        (q, k), v = Rotate.apply(qk, *rope).unbind(), v.squeeze(0)
        if cache is not None:
            keys, values, rows, positions = cache
            keys[rows[:, None], :, positions] = k.transpose(1, 2).to(keys.dtype)  # (B, T, H, D)
            values[rows[:, None], :, positions] = v.transpose(1, 2).to(keys.dtype)
            if mask is not None:  # a decoding step: rows are the first B slots, in order
                k, v = keys[:B, :, :mask.size(-1)], values[:B, :, :mask.size(-1)]
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
        self.packed = None, None, None  # Decoder's: what the weights were, and their copies for decoding on a CPU
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        freqs = config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angles = torch.arange(config.block_size, dtype=torch.float64, device="cpu")[:, None] * freqs  # (T, D / 2)
        self.register_buffer("cos", angles.cos().float().repeat(1, 2), persistent=False)  # (T, D)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), 1).float(), persistent=False)
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

    def hidden(self, idx, rope, mask=None, caches=None, blocks=None):
        """The final norm's output, (B, T, C)."""
        x, rope = self.wte(idx), tuple(r.to(self.wte.weight.dtype) for r in rope)
        for i, block in enumerate(blocks or self.blocks):
            x = block(x, rope, mask, caches and caches[i])
        return norm(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, *, temperature=1.0, top_p=1.0, seeds=None, stop_tokens=(), stop=None,
                 accept=None, batch_size=64, on_token=None, chunk=0):
        """Continue every prompt; returns one list of new tokens each, without the stop token that ended it.

        prompts: lists of token ids, none empty, of any lengths. max_new_tokens: of all, or a list, of each.
        temperature 0 is argmax; else the nucleus of probability `top_p` is sampled from, by one uniform number a token
        drawn from the row's own seed (`seeds`: ints, default 0, 1, ...), so that a sample does not depend on what
        shares its batch; its last bits do, as matrices of other shapes are added up in another order. A row ends at a
        token of `stop_tokens`, when `stop(new_tokens)` is true, after max_new_tokens, or at block_size; its place
        goes to the next prompt. `on_token(i, token)` is called as prompt i's tokens come, with None at its end.
        `accept(i, new, token)` is asked before `token` joins prompt i's list of new tokens: None takes it; False has
        another one drawn in its place; a list becomes the new tokens (what it shares with the old ones stays cached,
        the rest is fed). After a list that is no longer than `new`, tokens are drawn at temperature 1 even if
        `temperature` is 0, until a longer one comes; on_token hears of removed tokens as a negative number of them.
        chunk: steps between two looks at the tokens (0: 16 on CUDA, which waits for the device once a chunk; else 1, as
        always with `accept`). ValueError on an empty prompt or one that fills block_size."""
        S = self.config.block_size
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < S:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; it must have 1 to {S - 1} (block_size={S})")
        if not prompts or max_new_tokens == 0:
            return [[] for _ in prompts]
        B, most = min(batch_size, len(prompts)), max_new_tokens
        most = most if isinstance(most, (list, tuple)) else [most] * len(prompts)
        chunk = 1 if accept else chunk or (16 if self.wte.weight.is_cuda else 1)
        decoder = Decoder(self, B, min(S, max(map(len, prompts)) + max(most)), temperature, top_p, chunk)
        outputs, waiting = [None] * len(prompts), list(range(len(prompts)))[::-1]
        rows = []  # row s of the batch lives in slot s of the cache

        while waiting or rows:
            if waiting and B - len(rows) >= min(len(waiting), max(1, B // 8)):  # a few at a time: prefill in batches
                fresh = [waiting.pop() for _ in range(min(len(waiting), B - len(rows)))]
                decoder.prefill([row.seq[:row.start] for row in rows], [prompts[i] for i in fresh])
                for i in fresh:
                    start, random = len(prompts[i]), Random(seeds[i] if seeds is not None else i)
                    rows.append(SimpleNamespace(i=i, seq=list(prompts[i]), start=start, at=start - 1, random=random, hot=False,
                                                end=min(start + most[i], S)))
            # Each row is fed the token at its `at`, whose key is not cached yet; where that is its last, one is drawn.
            drawing = [row.at == len(row.seq) - 1 for row in rows]
            u = [[row.random.random() if draws and temperature else 0.0 for _ in range(chunk)]
                 for row, draws in zip(rows, drawing)]
            drawn = decoder.run([row.seq[row.at] for row in rows], [row.at for row in rows], u)
            ended = []
            for s, (row, draws) in enumerate(zip(rows, drawing)):
                row.at += 1
                for token in drawn[s] if draws else ():
                    keep = None
                    if accept:
                        token, keep = settle(accept, row, token, decoder.logits[s:s + 1], temperature, top_p)
                    if keep is not None:
                        new = row.seq[row.start:]
                        same = next((k for k, (x, y) in enumerate(zip(new, keep)) if x != y), min(len(new), len(keep)))
                        row.seq[row.start + same:] = keep[same:row.end - row.start]
                        row.at = min(row.at, row.start + same, len(row.seq) - 1)
                        row.hot = len(keep) <= len(new)
                        come = [same - len(new)] * (same < len(new)) + row.seq[row.start + same:]
                    elif token is None or token in stop_tokens:
                        ended.append(s)
                        break
                    else:
                        row.seq.append(token)
                        come = [token]
                    for t in come if on_token else ():
                        on_token(row.i, t)
                    if len(row.seq) == row.end or stop and stop(row.seq[row.start:]):
                        ended.append(s)
                        break
                else:
                    row.at += (chunk - 1) * draws
            for s in reversed(ended):  # the last row moves into the gap
                outputs[rows[s].i] = rows[s].seq[rows[s].start:]
                if on_token:
                    on_token(rows[s].i, None)
                last = rows.pop()
                if s < len(rows):
                    decoder.copy(len(rows), s, last.at)
                    rows[s] = last
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


class Packed(nn.Module):
    """nn.Linear for decoding in float32 on a CPU: the matrix laid out once for oneDNN's products with `rows` rows.
    F.linear's own layout is about half as fast."""

    def __init__(self, weight, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Decoder:
    """The cache of `slots` sequences, and the step that feeds each of them a token and draws its next. The shapes of a step
    depend on (n, limit) alone: slots in use and a bound of their lengths; on CUDA, a graph is captured for each pair."""

    def __init__(self, model, slots, length, temperature, top_p, chunk):
        c, w = model.config, model.wte.weight
        self.model, self.temperature, self.top_p, self.graphs = model, temperature, top_p, {}
        self.device, self.slots, length = w.device, slots, -(-(length + chunk) // 64) * 64
        zeros = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=w.device)
        # (layers, keys and values, slots, H, S, D): what a head attends to lies together, in the order of positions
        self.cache = zeros(c.n_layer, 2, slots, c.n_head, length, c.n_embd // c.n_head, dtype=w.dtype)
        self.tokens, self.at = zeros(slots, dtype=torch.int64), zeros(slots, dtype=torch.int64)
        self.u, self.drawn = zeros(slots, chunk, dtype=torch.float32), zeros(slots, chunk, dtype=torch.int64)
        self.logits = zeros(slots, c.vocab_size, dtype=torch.float32)
        self.blocks, self.head = model.blocks, lambda x: F.linear(x, model.head)
        if w.device.type == "cpu" and w.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            key = slots, [(p.data_ptr(), p._version) for p in model.parameters()]
            if model.packed[0] != key:  # kept for the next call: it takes the time of some tokens
                with torch.device("meta"):
                    blocks = [Block(c) for _ in model.blocks]
                for new, old in zip(blocks, model.blocks):
                    for part, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "gate_up"), ("mlp", "down")):
                        setattr(getattr(new, part), name, Packed(getattr(getattr(old, part), name).weight, slots))
                model.packed = key, blocks, Packed(model.head, slots)
            _, self.blocks, self.head = model.packed

    def hidden(self, idx, positions, slots, mask=None):
        """The final norm's output (B, T, C) for idx (B, T) at `positions` (B or 1, T), cached into `slots` (B,)."""
        at = positions.clamp(max=self.model.config.block_size - 1)  # past it, in vain: a row ended within its chunk
        rope = self.model.cos[at][:, None], self.model.sin[at][:, None]  # (B or 1, 1, T, D)
        return self.model.hidden(idx, rope, mask, [(k, v, slots, positions) for k, v in self.cache], self.blocks)

    def prefill(self, there, prompts):
        """Cache all of `prompts` but their last tokens, in the slots that follow those of the prompts `there`. A prompt is
        computed once and copied for its other samples."""
        first, part, longest = {}, [], 0
        for s, prompt in enumerate(there + prompts):
            first.setdefault(tuple(prompt), s)
        new = [(prompt[:-1], s) for prompt, s in first.items() if s >= len(there) and len(prompt) > 1]
        for k, (prompt, s) in enumerate(new):
            part, longest = part + [(prompt, s)], max(longest, len(prompt))
            if k + 1 < len(new) and max(longest, len(new[k + 1][0])) * (len(part) + 1) <= 8192:
                continue
            # Padded on the right: causal attention keeps the padding from every real token, and decoding overwrites its
            # keys before the mask lets anyone see them.
            idx = torch.tensor([prompt + (0,) * (longest - len(prompt)) for prompt, _ in part], device=self.device)
            self.hidden(idx, torch.arange(longest, device=self.device)[None],
                        torch.tensor([s for _, s in part], device=self.device))
            part, longest = [], 0
        for s, prompt in enumerate(prompts, len(there)):
            if first[tuple(prompt)] != s:
                self.copy(first[tuple(prompt)], s, len(prompt) - 1)

    def copy(self, source, to, length):
        self.cache[:, :, to, :, :length] = self.cache[:, :, source, :, :length]

    def step(self, n, limit):
        """Feed self.tokens[:n] at the positions self.at[:n], all below `limit`; what is drawn by self.u's next numbers is fed
        by the next step."""
        tokens, at, u, drawn = self.tokens[:n], self.at[:n], self.u[:n], self.drawn[:n]
        unseen = torch.arange(limit, device=self.device) > at[:, None]
        mask = torch.zeros(n, limit, dtype=self.cache.dtype, device=self.device).masked_fill_(unseen, -math.inf)
        x = self.hidden(tokens[:, None], at[:, None], torch.arange(n, device=self.device), mask[:, None, None])
        self.logits[:n] = self.head(x[:, 0])
        tokens.copy_(sample_tokens(self.logits[:n], self.temperature, self.top_p, u[:, 0]))
        drawn.copy_(torch.cat((drawn[:, 1:], tokens[:, None]), 1))
        u.copy_(u.roll(-1, 1))
        at += 1

    def run(self, tokens, at, u):
        """A step for each number in u (n lists) from tokens (n,) at the positions at (n,) -> the tokens drawn (n lists)."""
        n, chunk, cuda = len(tokens), len(u[0]), self.device.type == "cuda"
        slots = min(self.slots, 1 << (n - 1).bit_length()) if cuda else n  # few graphs: the rest feeds position 0, in vain
        limit = max(at) + chunk
        shape = slots, -(-limit // 64) * 64 if cuda else limit

        def load():
            self.at.zero_()
            for buffer, values in ((self.tokens, tokens), (self.at, at), (self.u, u)):
                buffer[:n] = torch.tensor(values, device=self.device)

        load()
        if cuda and shape not in self.graphs:
            stream = torch.cuda.Stream()  # once outside a graph: kernels are chosen and loaded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(*shape)
            torch.cuda.current_stream().wait_stream(stream)
            graph = self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(*shape)
            load()
        for _ in range(chunk):
            self.graphs[shape].replay() if cuda else self.step(*shape)
        return self.drawn[:n].tolist()


def settle(accept, row, token, logits, temperature, top_p):
    """(token, the list that takes its place or None): the first draw that `accept` does not refuse; token None where it
    refuses all. logits: (1, V), of which the refused are struck out: what may be taken is drawn from, exactly."""
    new, temperature = row.seq[row.start:], temperature or float(row.hot)
    draw = lambda t: sample_tokens(logits, t, top_p, torch.tensor([row.random.random()], device=logits.device)).item()
    if row.hot:
        token = draw(temperature)
    for refused in range(1, logits.size(1) + 1):
        keep = accept(row.i, new, token)
        if keep is not False:
            return token, keep
        logits[0, token] = -math.inf
        token = draw(temperature if refused < 64 else 0)  # then the best that is left
    return None, None


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
        k = V = p.size(-1)
        if p.device.type == "cpu":  # all that are less likely than this hold less than 1 - top_p, so that none is in the nucleus
            k = int((p >= (1 - top_p) / V).sum(-1).max())
        p, order = p.topk(k) if k < V else p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    u = u.to(logits.device)[:, None] * cumulative[:, -1:]
    pick = torch.searchsorted(cumulative, u, right=True).clamp(max=p.size(-1) - 1)
    return (pick if order is None else order.gather(1, pick)).squeeze(1)
