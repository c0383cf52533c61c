"""The model: GPT-2's shapes with OLMo's changes (TinyCodeLM, arXiv 2410.02749), in one file.

Against GPT-2: no biases, LayerNorm without weight or bias, SwiGLU, rotary positions, tied
embeddings, no dropout. The same function as Hugging Face's `OlmoForCausalLM`, whose files
`from_pretrained` and `save_pretrained` read and write.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))  # 151,879,680 parameters: the 150M
    logits, _ = model(idx)                           # (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(idx, targets)                    # next-token cross-entropy
    tokens = model.generate([[1, 2, 3], [4]], 20)    # any number of prompts, of any lengths

Left out: dropout and grouped heads (the paper has none), tensor parallelism (any GPU holds them).
"""
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50304  # rows of the embedding: the tokenizer's entries, rounded up to 64s
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_hidden: int = 0  # width of SwiGLU; 0: 4 * n_embd, as published
    rope_theta: float = 10000.0
    tied: bool = True  # the output layer is the embedding

    def __post_init__(self):
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even "
                             "number: rotary positions turn pairs")


# -- The forward pass ------------------------------------------------------------------------------

def norm(x):
    """LayerNorm without weight or bias, OLMo's (eps=1e-5, torch's default)."""
    return F.layer_norm(x, x.shape[-1:])


def rotate(x, cos, sin):
    """Rotary positions (RoPE): elements i and i + D/2 of a head are a pair, turned by position *
    frequency i. x: (B, H, T, D); cos, sin: broadcastable to it, the first half of sin negative."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions. Another kind of attention: here, its masks
    in GPT.forward and Decoder.step, its cache's shape in Decoder.__init__; what takes qkv for three
    equal pieces: olmo_names (the files) and train.make_optimizers (Muon); flops_per_token."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # rows: q, k, v
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, mask, cache):
        """x: (B, T, C). rope: cos and sin, (2, 1, T, D) or (2, B, 1, T, D). mask: (B, 1, T, S), or
        None for causal, or (N + 1,): where N packed examples begin in B * T tokens, and the end.
        cache: None, or (keys_values, slots, positions): this call's keys and values are written to
        keys_values (2, slots, H, S, D) at [:, slots, :, positions]. Prefill (mask None) does no
        more with it; decoding (a mask) attends to what the first B slots hold."""
        B, T, H = *x.shape[:2], self.n_head
        qk, v = self.qkv(x).view(B, T, 3 * H, -1).transpose(1, 2).split((2 * H, H), 1)
        q, k = rotate(qk, *rope).chunk(2, 1)  # (B, H, T, D) each
        if cache:
            keys_values, slots, positions = cache
            # (B, T, 2, H, D): two indices with a slice between them put their B and T in front
            keys_values[:, slots[:, None], :, positions] = torch.stack((k, v)).permute(
                1, 3, 0, 2, 4)
            if mask is not None:
                k, v = keys_values[:, :B, :, :mask.size(-1)]
        if mask is not None and mask.dim() == 1:
            flat = (t.transpose(1, 2).flatten(0, 1).to(v.dtype) for t in (q, k, v))  # (B * T, H, D)
            y = varlen_attn(*flat, mask, mask, T, T, window_size=(-1, 0)).view(x.shape)
        else:
            with torch.autocast("cpu", enabled=False):  # there it takes twice as long in bfloat16
                y = F.scaled_dot_product_attention(
                    q, k, v if x.is_cuda else v.to(q.dtype), attn_mask=mask, is_causal=mask is None)
            y = y.transpose(1, 2).flatten(2)
        return self.proj(y)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, C) to the same."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then SwiGLU, each added to the residual stream x (B, T, C), which it reads
    normed."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, mask, cache):
        x = x + self.attn(norm(x), rope, mask, cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """A decoder-only transformer with OLMo's changes; what it writes (generate) and Hugging Face's
    files of it (save_pretrained, from_pretrained)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = None if config.tied else nn.Linear(
            config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        # Twice: a row that is full runs on to the end of its chunk of tokens, in vain. On the CPU:
        # from_pretrained builds under torch.device("meta"), and no file holds `rope`
        positions = torch.arange(2 * config.block_size, dtype=torch.double, device="cpu")
        pairs = positions.new_tensor(range(half))
        angles = torch.outer(positions, config.rope_theta ** (-pairs / half))  # (T, D / 2)
        cos, sin = angles.cos(), angles.sin()
        rope = torch.cat((torch.stack((cos, -sin)), torch.stack((cos, sin))), -1)
        self.register_buffer("rope", rope.float(), persistent=False)  # cos and sin, (2, T, D)
        for name, p in self.named_parameters():
            # the residual stream sums up 2 * n_layer outputs: its variance is to stay
            into_residual = name.endswith(("proj.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02)

    @property
    def head(self):
        """The output layer's weight, (vocab_size, C)."""
        return (self.lm_head or self.wte).weight

    def num_params(self):
        """All parameters, a tied embedding once: 151,879,680 and 454,164,480 at the paper's
        shapes."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length):
        """Training FLOPs a token of a sequence of `length`: 6 for each weight that multiplies
        (every matrix; the tied embedding counts once, as the output layer: the look-up is free),
        and 12 * n_layer * n_embd * length / 2 for causal attention (queries x keys and weights x
        values, forward and twice that backward)."""
        matrices = self.num_params() - (not self.config.tied) * self.wte.weight.numel()
        return 6 * (matrices + self.config.n_layer * self.config.n_embd * length)

    def forward(self, idx, targets=None, segments=None):
        """idx: (B, T) int64, T <= block_size. Returns (logits, loss).

        Without targets: logits (B, T, vocab_size), loss None. With targets (B, T), -1 where there
        is no loss: logits None, loss the mean cross-entropy over the rest. segments:
        (B, T) ints, for several examples packed into one row: a token attends to its own segment
        only. Rotary attention knows nothing but differences of positions, so a packed example sees
        just what it sees alone."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are longer than block_size={self.config.block_size}")
        mask = None
        if segments is not None:
            if torch.is_autocast_enabled("cuda"):  # bfloat16, for flash attention: (N + 1,)
                starts = F.pad(segments.diff() != 0, (1, 0), value=True).flatten().nonzero()[:, 0]
                mask = F.pad(starts, (0, 1), value=B * T).int()
            else:  # (B, 1, T, T)
                mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        x = self.hidden(idx, torch.arange(T, device=idx.device), mask)
        logits = F.linear(x, self.head)
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                                reduction="sum")
        return None, total / (targets >= 0).sum().clamp(min=1)

    def hidden(self, idx, positions, mask, cache=None, slots=None):
        """The final norm's output, (B, T, C), for idx (B, T) at `positions`, (T,) or (B or 1,
        T)."""
        x = self.wte(idx)
        rope = self.rope[:, positions].unsqueeze(-3).to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, None if cache is None else (cache[i], slots, positions))
        return norm(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, *, temperature=1.0, top_p=1.0, seeds=(),
                 stop_tokens=(), stop=None, check_tokens=(), check=None, batch_size=64,
                 on_token=lambda i, token: None, chunk=0):
        """Continue every prompt; a list of new tokens for each, without the stop token that ended
        it. ValueError on an empty prompt or one that fills block_size.

        prompts: lists of token ids. max_new_tokens: of all, or a list. temperature 0 takes the
        likeliest token; else one is drawn from the nucleus of probability `top_p` by a uniform
        number of the row's own seed (seeds: ints, default 0, 1, ...), so that what shares its batch
        changes nothing but last bits. A row ends at one of `stop_tokens`, when stop(new) is true of
        its new tokens, after max_new_tokens or at block_size; its place goes to the next prompt.
        on_token(i, token) hears of prompt i's tokens as they come, then None (if it may have any).
        When one of `check_tokens` has come, check(i, new) answers None, or how many of the new
        tokens to keep, fewer than there are: the rest is drawn again (on_token hears how many go,
        as a negative number), at temperature 1 where it was 0, until a check answers None.
        chunk: steps between two looks at the tokens, at most block_size; 0: 1, but 16 on CUDA."""
        all_rows, block_size = [], self.config.block_size
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < block_size:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, not 1 to {block_size - 1}")
            most = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[i]
            all_rows.append(Row(i, tuple(prompt), min(most, block_size - len(prompt)), temperature,
                                Random(seeds[i] if seeds else i), []))
        waiting, rows = [row for row in all_rows if row.max_new > 0], []  # rows[s] has slot s
        slots = min(batch_size, len(all_rows))
        decoder = Decoder(self, all_rows, slots, top_p, chunk)

        def take(row, drawn):
            """Give a row the tokens of a chunk, as far as they hold; True where the row ends."""
            for token in drawn:
                if token in stop_tokens:
                    return True
                row.new.append(token)
                on_token(row.i, token)
                checked = token in check_tokens
                keep = check(row.i, row.new) if checked else None
                if keep is not None:
                    on_token(row.i, keep - len(row.new))
                    del row.new[keep:]
                    row.temperature = temperature or 1.0  # at 0 it would be the same again
                    return False
                if len(row.new) == row.max_new or stop and stop(row.new):
                    return True
                if checked and row.temperature != temperature:  # the chunk's rest was drawn so, too
                    row.temperature = temperature
                    return False

        while waiting or rows:
            free = slots - len(rows)
            if waiting and free >= min(len(waiting), max(1, slots // 8)):  # a prefill for several
                admitted, waiting = waiting[:free], waiting[free:]
                decoder.prefill(len(rows), [row.prompt for row in admitted])
                rows += admitted
            for s, drawn in reversed([*enumerate(decoder.draw(rows))]):  # what moves has been seen
                if take(rows[s], drawn):
                    on_token(rows[s].i, None)
                    last = rows.pop()
                    if s < len(rows):
                        rows[s], decoder.cache[:, :, s] = last, decoder.cache[:, :, len(rows)]
        return [row.new for row in all_rows]

    # -- Hugging Face's OlmoForCausalLM ------------------------------------------------------------

    def save_pretrained(self, folder, **extra):
        """Write config.json and model.safetensors into `folder`, for transformers'
        `AutoModelForCausalLM`. extra: more keys of config.json, such as eos_token_id."""
        from safetensors.torch import save
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = OLMO | {theirs: getattr(c, ours) for ours, theirs in OLMO_NAMES.items()} | dict(
            architectures=["OlmoForCausalLM"], num_key_value_heads=c.n_head,
            pad_token_id=None, eos_token_id=None,
            torch_dtype=str(self.wte.weight.dtype).split(".")[1]) | extra
        state, tensors = self.state_dict(), {}
        for ours, theirs in olmo_names(c).items():
            tensors |= zip(theirs, state[ours].chunk(len(theirs)))
        new = folder / "model.tmp"  # a crash leaves the old weights whole
        new.write_bytes(save(tensors, {"format": "pt"}))
        new.replace(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name):
        """A model from a folder or the Hugging Face hub ("upiter/TinyCodeLM-150M"): our own
        `ckpt.pt`, or config.json with model.safetensors or pytorch_model.bin, whole or in shards
        with an index; float32 or bfloat16, which it keeps. Its `.info` says what it was trained
        on: form, tokenizer, step, ... OSError or ValueError, one line, where that fails."""
        folder = find_pretrained(name)
        ckpt = folder / "ckpt.pt"
        saved = load_file(ckpt) if ckpt.is_file() else read_olmo(folder)
        try:
            with torch.device("meta"):  # no time spent on weights that are replaced at once
                model = cls(GPTConfig(**saved["config"]))
            model.load_state_dict(saved["model"], assign=True)
            model.info = saved["meta"] | {key: saved.get(key) for key in ("step", "settings")}
        except Exception as e:  # whatever is in it
            raise ValueError(
                f"{folder}: the weights are not those of its config: {one_line(e)}") from None
        return model


# -- Generation: the rows of a batch, the key-value cache, a step ----------------------------------

@dataclass
class Row:
    """One prompt of a batch."""
    i: int
    prompt: tuple
    max_new: int  # tokens
    temperature: float
    random: Random
    new: list  # tokens so far


def pack_linear(weight, rows):
    """x -> x @ weight.T in float32 on a CPU, with the matrix laid out once for oneDNN's products
    with `rows` rows: F.linear's own layout is about half as fast."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


class Decoder:
    """The cache of `slots` sequences, with room for the longest of `rows`, and the step that feeds
    each its last token and draws the next. The shapes of a step depend on nothing but how many
    slots are in use, a bound of their lengths, and whether all are greedy; on CUDA a graph is
    captured for each."""

    def __init__(self, model, rows, slots, top_p, chunk):
        c, w = model.config, model.wte.weight
        self.top_p, self.graphs, self.pool = top_p, {}, None
        self.chunk = chunk = chunk or (16 if w.is_cuda else 1)
        # A slot's row: [last token, its position, temperature, u_1, ..., u_chunk], the u uniform
        # in [0, 1). A step drops u_1 and appends the token that it draws, so that after a chunk the
        # columns from 3 on are its tokens.
        self.state = torch.zeros(slots, 3 + chunk, device=w.device)
        longest = max((len(row.prompt) + row.max_new for row in rows), default=0)
        # (layers, keys and values, slots, H, S, D): what a head attends to lies together. A row
        # that ends inside a chunk runs on to the chunk's end; draw rounds up, by less than 64.
        self.cache = torch.zeros(c.n_layer, 2, slots, c.n_head, longest + chunk + 64,
                                 c.n_embd // c.n_head, dtype=w.dtype, device=w.device)
        self.model, self.head = model, lambda x: F.linear(x, model.head)
        if w.is_cpu and w.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            shared = {id(p): p for p in model.parameters()}  # they are not copied
            self.model, self.head = copy.deepcopy(model, shared), pack_linear(model.head, slots)
            for part in self.model.modules():
                if isinstance(part, nn.Linear):
                    part.forward, part.weight = pack_linear(part.weight, slots), None

    def prefill(self, start, prompts):
        """Cache `prompts` in the slots from `start` on. One that comes again is computed once."""
        firsts, device = {}, self.cache.device
        for slot, prompt in enumerate(prompts, start):
            firsts.setdefault(prompt, slot)
        # Padded on the right: causal attention keeps the padding from every real token, and
        # decoding overwrites its keys before the mask lets anyone see them.
        longest = max(map(len, prompts))
        idx = torch.tensor([prompt + (0,) * (longest - len(prompt)) for prompt in firsts],
                           device=device)
        cache = self.cache[..., :longest, :]
        self.model.hidden(idx, torch.arange(longest, device=device)[None], None, cache,
                          torch.tensor(list(firsts.values()), device=device))
        cache[:, :, start:start + len(prompts)] = cache[:, :, [firsts[p] for p in prompts]]

    def step(self, n, limit, greedy):
        """Feed the first n slots their tokens, at positions below `limit`, and draw the next."""
        state, device = self.state[:n], self.cache.device
        tokens, positions = state[:, :2, None].long().unbind(1)  # (n, 1) each
        mask = torch.where(torch.arange(limit, device=device) <= positions, 0, -math.inf).to(
            self.cache.dtype)[:, None, None]  # (n, 1, 1, limit); a bool is turned in each layer
        x = self.model.hidden(tokens, positions, mask, self.cache, torch.arange(n, device=device))
        logits = self.head(x[:, 0])
        drawn = (logits.argmax(-1) if greedy else
                 sample_tokens(logits, state[:, 2], self.top_p, state[:, 3]))[:, None]
        state.copy_(torch.cat((drawn, positions + 1, state[:, 2:3], state[:, 4:], drawn), 1))

    def draw(self, rows):
        """The next `chunk` tokens of each of the rows, as lists."""
        positions, cuda = [len(row.prompt) + len(row.new) - 1 for row in rows], self.cache.is_cuda
        self.state.zero_()
        self.state[:len(rows)] = torch.tensor([
            [(row.new or row.prompt)[-1], at, row.temperature]
            + [row.random.random() for _ in range(self.chunk)] for row, at in zip(rows, positions)])
        # on CUDA few shapes, few graphs: a slot without a row is fed a token at position 0, in vain
        unit, n = 64 if cuda else 16, len(rows)
        n = min(unit * math.ceil(n / unit), len(self.state)) if cuda else n
        limit = unit * math.ceil((max(positions) + self.chunk) / unit)
        shape = n, limit, not any(row.temperature for row in rows)
        for _ in range(self.chunk):
            if shape in self.graphs:
                self.graphs[shape].replay()
                continue
            self.step(*shape)
            if cuda:  # its kernels are chosen and loaded now
                self.graphs[shape] = graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    self.step(*shape)
                self.pool = graph.pool()  # one memory for all graphs: no two run at the same time
        return self.state[:len(rows), 3:].int().tolist()


def sample_tokens(logits, temperatures, top_p, u):
    """One token a row. logits: (B, V); temperatures: (B,), 0 is argmax, and so is a top_p of 0; u:
    (B,) uniform in [0, 1). The inverse of the cumulative distribution over the nucleus: the fewest
    likeliest tokens that hold top_p, and those as likely as the last of them."""
    best, likeliest = logits.max(-1, keepdim=True)
    weigh = lambda x: ((x.float() - best) / temperatures.clamp(min=1e-6)[:, None]).exp()
    w = weigh(logits)
    total = w.sum(-1, keepdim=True)
    # On a CPU without those that cannot be in the nucleus: all of them hold less than 1 - top_p.
    # On CUDA as they are: bfloat16 sorts in half of float32's time
    ordered = (
        logits.topk(int((w >= (1 - top_p) / 2 / w.size(-1) * total).sum(-1).max())) if w.is_cpu
        else logits.sort(-1, descending=True)).values
    ordered_w = weigh(ordered)
    inside = ordered_w.cumsum(-1) - ordered_w <= top_p * total  # the likeliest always is
    cumulative = (w * (logits >= ordered.gather(1, inside.sum(-1, keepdim=True) - 1))).cumsum(-1)
    below = u.clamp(max=0.99999994)[:, None]  # float32 rounds 1 - 2 ** -53 to 1
    drawn = torch.searchsorted(cumulative, below * cumulative[:, -1:], right=True)
    return torch.where((temperatures * top_p)[:, None] == 0, likeliest, drawn).squeeze(1)


# -- Files of weights ------------------------------------------------------------------------------

# What config.json calls GPTConfig's fields, and what it must say of the rest.
OLMO_NAMES = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
              "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_embd": "hidden_size", "n_hidden": "intermediate_size",
              "rope_theta": "rope_theta", "tied": "tie_word_embeddings"}
OLMO = {"model_type": "olmo", "hidden_act": "silu", "attention_bias": False, "clip_qkv": None}


def olmo_names(config):
    """{our tensor's name: (Hugging Face's names of its equal parts, in order)}"""
    names = {"wte.weight": ("model.embed_tokens.weight",)}
    if not config.tied:
        names["lm_head.weight"] = ("lm_head.weight",)
    parts = {"attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
             "attn.proj": ("self_attn.o",),
             "mlp.gate_up": ("mlp.gate", "mlp.up"), "mlp.down": ("mlp.down",)}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            names[f"blocks.{i}.{ours}.weight"] = tuple(
                f"model.layers.{i}.{name}_proj.weight" for name in theirs)
    return names


def find_pretrained(name):
    """The folder `name`; or, of a model on the Hugging Face hub ("owner/name"), the one that holds
    its config, tokenizer and weights. OSError, one line, if it cannot be had."""
    if Path(name).exists() or str(name).count("/") != 1:
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, ignore_patterns="*/*", allow_patterns=[
            "*.json", "*.safetensors", "pytorch_model*.bin"]))
    except Exception as e:  # it says whether it is gated, private, ...
        raise OSError(f"no folder here; of the Hugging Face hub: {one_line(e)}") from None


def one_line(error):
    """What an exception says, without line breaks and without the end of a long tale."""
    if isinstance(error, ImportError):
        return f"pip install {error.name}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_file(path):
    """What a .json or .safetensors file, or one of torch.save, holds: a dict. ValueError, one line,
    if it is missing, torn, or holds code."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        if path.suffix == ".safetensors":
            import safetensors.torch
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {one_line(e)}") from None


def load_tensors(folder):
    """{name: tensor} of model.safetensors or pytorch_model.bin, or of the shards in their index."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index, tensors = folder / f"{kind}.index.json", {}
        if (folder / kind).is_file():
            return load_file(folder / kind)
        if index.is_file():
            for file in set(load_file(index).get("weight_map", {}).values()):
                tensors |= load_file(folder / file)
            return tensors
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def read_olmo(folder):
    """The files of Hugging Face's OlmoForCausalLM as train.py saves a model; ValueError on what
    ours cannot compute."""
    path = folder / "config.json"
    hf = {"rope_theta": 10000.0, "tie_word_embeddings": False} | load_file(path)
    hf |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    fixed = OLMO | {"num_key_value_heads": hf.get("num_attention_heads"), "rope_type": "default",
                    "type": "default"}  # rope_type's older name
    wrong = [f"{key}={hf[key]!r}" for key in fixed if hf.get(key) not in (None, fixed[key])]
    wrong += [f"{key}={hf.get(key)!r}" for key in OLMO_NAMES.values()
              if not isinstance(hf.get(key), (int, float))]
    if wrong:
        raise ValueError(f"{path}: not supported: {', '.join(wrong)}")
    config = GPTConfig(**{ours: hf[theirs] for ours, theirs in OLMO_NAMES.items()})
    tensors = load_tensors(folder)
    head = tensors.get("lm_head.weight")
    if head is not None:  # some files hold a tied one twice
        config.tied |= torch.equal(head, tensors.get("model.embed_tokens.weight", head))
    if config.tied:
        tensors.pop("lm_head.weight", None)
    names = olmo_names(config)
    wrong = set(tensors) ^ set(sum(names.values(), ()))
    if wrong:
        raise ValueError(f"{folder}: missing or unknown: {', '.join(sorted(wrong)[:9])}")
    state = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}
    return {"config": vars(config), "model": state, "step": 0, "meta": {
        "form": hf.get("form"), "tokenizer": str(folder / "tokenizer.json")}}
