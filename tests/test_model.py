"""model.py against transformers' OLMo, against itself without a cache, and against a plain cross-entropy."""
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, sample_tokens

SMALL = dict(block_size=96, vocab_size=320, n_layer=3, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # far from uniform, so that argmax and attention have something to decide
    return model


@pytest.mark.parametrize("shape, count", [((12, 12, 768), 151_879_680), ((24, 16, 1024), 454_164_480)])
def test_published_parameter_counts(shape, count):
    layers, heads, width = shape
    with torch.device("meta"):
        assert GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width)).num_params() == count


def test_equals_transformers_olmo_both_ways(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "OlmoForCausalLM"
    idx = torch.randint(320, (3, 96))
    with torch.no_grad():
        ours, other = model(idx)[0], theirs(idx).logits
        assert ours.std() > 0.5 and (ours - other).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    back = GPT.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back(idx)[0], model(idx)[0])


def test_refuses_what_it_cannot_compute(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"clip_qkv": null', '"clip_qkv": 8.0'))
    with pytest.raises(ValueError, match="clip_qkv=8.0"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither ckpt.pt nor config.json"):
        GPT.from_pretrained(tmp_path / "nothing")


def test_loss_and_gradients_equal_plain_cross_entropy(model):
    idx, targets = torch.randint(320, (4, 64)), torch.randint(320, (4, 64))
    targets[torch.rand(4, 64) < 0.3] = -1
    params = list(model.parameters())
    loss = model(idx, targets)[1]
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(loss - plain) < 1e-5
    for a, b in zip(torch.autograd.grad(loss * 3, params), torch.autograd.grad(plain * 3, params)):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
    with torch.no_grad():
        assert abs(model(idx, targets)[1] - plain) < 1e-5


def test_chunks_do_not_change_the_loss(model):
    from model import FusedCrossEntropy
    x, targets = torch.randn(70, 64, requires_grad=True), torch.randint(-1, 320, (70,))
    results = [torch.autograd.grad(FusedCrossEntropy.apply(x, model.wte.weight, targets, chunk, True), [x, model.wte.weight])
               for chunk in (7, 1000)]
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-4


def test_packed_examples_see_only_themselves(model):
    a, b = torch.randint(320, (1, 30)), torch.randint(320, (1, 25))
    segments = torch.tensor([[0] * 30 + [1] * 25])
    with torch.no_grad():
        packed = model(torch.cat((a, b), 1), None, segments)[0]
        assert (packed[:, :30] - model(a)[0]).abs().max() < 1e-4
        assert (packed[:, 30:] - model(b)[0]).abs().max() < 1e-4
        assert (model(torch.cat((a, b), 1))[0][:, 30:] - model(b)[0]).abs().max() > 0.1  # it does matter


def greedy(model, prompt, n):
    """What generate must give, by plain forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_generation_equals_plain_forward(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (1, 40, 7, 7, 95, 23, 3)]
    out = model.generate(prompts, 20, temperature=0, batch_size=3)
    assert out == [greedy(model, p, min(20, 96 - len(p))) for p in prompts]


def test_stop_tokens_callbacks_and_streaming(model):
    prompt = torch.randint(320, (9,)).tolist()
    full = model.generate([prompt], 20, temperature=0)[0]
    at = next(i for i in range(3, 20) if full[i] not in full[:i])
    assert model.generate([prompt], 20, temperature=0, stop_tokens=(full[at],))[0] == full[:at]
    assert model.generate([prompt], 20, temperature=0, stop=lambda new: len(new) == 5)[0] == full[:5]
    seen = []
    model.generate([prompt], 6, temperature=0, on_token=lambda i, t: seen.append(t))
    assert seen == full[:6] + [None]
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        model.generate([prompt, []], 5)


def test_a_sample_does_not_depend_on_its_batch(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1, 60, 8)]
    together = model.generate(prompts, 25, seeds=[9, 8, 7, 6, 5, 4], top_p=0.9, batch_size=4)
    alone = [model.generate([p], 25, seeds=[s], top_p=0.9)[0] for p, s in zip(prompts, [9, 8, 7, 6, 5, 4])]
    assert together == alone
    assert model.generate(prompts[:1], 25, seeds=[1])[0] != model.generate(prompts[:1], 25, seeds=[2])[0]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_looking_at_the_tokens_once_a_chunk_changes_nothing(model, temperature):
    """As on CUDA, where 16 steps are taken before the host sees a token: rows end anywhere within a chunk."""
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1, 90, 8, 93)]
    most = [25, 3, 17, 25, 25, 1, 25]  # the fifth and the last end at block_size
    seen = {}
    call = lambda chunk: model.generate(prompts, most, temperature=temperature, top_p=0.9, batch_size=3, chunk=chunk,
                                        stop_tokens=range(0, 320, 16), stop=lambda new: new[-1] % 16 == 1,
                                        on_token=lambda i, t: seen.setdefault((chunk, i), []).append(t))
    one, five = call(1), call(5)
    assert one == five and all(len(x) <= n for x, n in zip(one, most)) and len(one[4]) <= 6 and len({*map(len, one)}) > 2
    assert all(seen[1, i] == seen[5, i] == x + [None] for i, x in enumerate(one))


def test_samples_of_one_prompt_share_its_cache_and_nothing_else(model, monkeypatch):
    prompts = [p for p in (torch.randint(320, (n,)).tolist() for n in (20, 33)) for _ in range(5)]
    most = [9, 15, 4, 11, 15, 7, 15, 9, 12, 15]
    alone = [model.generate([p], n, seeds=[s])[0] for s, (p, n) in enumerate(zip(prompts, most))]
    computed, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *args: computed.append(idx.shape) or hidden(self, idx, *args))
    assert model.generate(prompts, most, batch_size=4) == alone and len(set(map(tuple, alone))) == 10
    assert sum(rows for rows, length in computed if length > 1) == 2  # of ten prompts two were computed


def test_refused_tokens_leave_the_distribution_of_the_rest(model):
    prompt = [5, 6, 7]
    logits = model(torch.tensor([prompt]))[0][0, -1].detach()
    taboo = set(logits.topk(40).indices.tolist())
    out = model.generate([prompt] * 4000, 1, accept=lambda i, new, token: False if token in taboo else None, batch_size=500)
    logits[list(taboo)] = -float("inf")
    p, count = logits.softmax(-1), torch.bincount(torch.tensor(out)[:, 0], minlength=320)
    keep = p > 0
    assert count[~keep].sum() == 0
    chi2 = ((count[keep] - 4000 * p[keep]) ** 2 / (4000 * p[keep])).sum().item()
    assert chi2 < 279 + 5 * (2 * 279) ** 0.5  # mean and deviation of chi-squared with 279 degrees of freedom
    allowed = lambda i, new, token: None if token == 8 else False
    assert model.generate([prompt], 3, temperature=0, accept=allowed) == [[8, 8, 8]]
    assert model.generate([prompt], 3, accept=lambda i, new, token: False) == [[]]


def test_a_cut_part_is_drawn_again_as_if_it_had_not_been(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1)]
    plain = model.generate(prompts, 12, temperature=0)
    for temperature in (0, 1.0):
        cuts, seen = {}, [[] for _ in prompts]

        def accept(i, new, token):  # the eighth token of each row: back to the third, twice; then all of it is kept
            cuts[i] = cuts.get(i, 0) + (len(new) == 7)
            return None if len(new) != 7 else new[:3] if cuts[i] < 3 else new + [token]

        def on_token(i, token):
            if token is not None and token < 0:
                del seen[i][token:]
            elif token is not None:
                seen[i].append(token)

        out = model.generate(prompts, 12, temperature=temperature, accept=accept, on_token=on_token, batch_size=3)
        assert out == seen and list(map(len, out)) == [12] * 4 and set(cuts.values()) == {3}
        cuts.clear()
        assert out == [model.generate([p], 12, temperature=temperature, accept=lambda _, new, t: accept(i, new, t), seeds=[i])[0]
                       for i, p in enumerate(prompts)]
        if not temperature:  # after the cut, argmax again from the ninth on
            assert all(o[:3] == p[:3] and o != p for o, p in zip(out, plain))
            assert [o[8:] for o in out] == [greedy(model, p + o[:8], 4) for p, o in zip(prompts, out)]


def test_replaced_tokens_are_read_in_place_of_the_old(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1)]
    plain, other = model.generate(prompts, 20, temperature=0), [7, 8, 9, 10, 11]
    accept = lambda i, new, token: new[:4] + other + [token] if len(new) == 6 else None
    for n, (p, old, new) in enumerate(zip(prompts, plain, model.generate(prompts, 20, temperature=0, accept=accept, batch_size=3))):
        assert new[:10] == old[:4] + other + [old[6]] and new[10:] == greedy(model, p + new[:10], 10)


def test_sampling_follows_the_nucleus():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])
    u = (torch.arange(20_000) + 0.5) / 20_000
    draw = lambda top_p, t=1.0: torch.bincount(sample_tokens(p.log().expand(20_000, 4), t, top_p, u), minlength=4) / 20_000
    assert torch.allclose(draw(1.0), p, atol=1e-3)
    assert torch.allclose(draw(0.7), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=1e-3)  # 0.5 + 0.25 >= 0.7
    assert torch.allclose(draw(1.0, 0.5), p ** 2 / (p ** 2).sum(), atol=1e-3)
