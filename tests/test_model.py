"""model.py against transformers' OLMo, itself without a cache, and a plain cross-entropy."""
import shutil

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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize(
    "shape, count", [((12, 12, 768), 151_879_680), ((24, 16, 1024), 454_164_480)]
)
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


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing/config.json cannot be read: .*No such file"):
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


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_it_has_the_same_gradients(model):
    idx, targets = torch.randint(320, (2, 4, 64))
    params = list(model.parameters())
    losses = [call(idx, targets)[1] for call in (model, torch.compile(model))]
    assert abs(losses[0] - losses[1]) < 1e-5
    for a, b in zip(*(torch.autograd.grad(loss, params) for loss in losses)):
        assert (a - b).norm() < 1e-4 * a.norm()


def test_packed_examples_see_only_themselves(model):
    a, b = torch.randint(320, (1, 30)), torch.randint(320, (1, 25))
    segments = torch.tensor([[0] * 30 + [1] * 25])
    with torch.no_grad():
        packed = model(torch.cat((a, b), 1), None, segments)[0]
        assert (packed[:, :30] - model(a)[0]).abs().max() < 1e-4
        assert (packed[:, 30:] - model(b)[0]).abs().max() < 1e-4
        assert (
            model(torch.cat((a, b), 1))[0][:, 30:] - model(b)[0]
        ).abs().max() > 0.1  # it does matter


def greedy(model, prompt, n):
    """What generate must give, by plain forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_equals_plain_forward(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (1, 40, 7, 7, 95, 23, 3)]
    out = model.generate(prompts, 20, temperature=0, batch_size=3)
    assert out == [greedy(model, p, min(20, 96 - len(p))) for p in prompts]


def test_stop_tokens_callbacks_and_streaming(model):
    prompt = torch.randint(320, (9,)).tolist()
    full = model.generate([prompt], 20, temperature=0)[0]
    at = next(i for i in range(3, 20) if full[i] not in full[:i])
    assert model.generate([prompt], 20, temperature=0, stop_tokens=(full[at],))[0] == full[:at]
    assert (
        model.generate([prompt], 20, temperature=0, stop=lambda new: len(new) == 5)[0] == full[:5]
    )
    seen = []
    model.generate([prompt], 6, temperature=0, on_token=lambda i, t: seen.append(t))
    assert seen == full[:6] + [None]
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        model.generate([prompt, []], 5)
    assert model.generate([], 5) == [] and model.generate([prompt] * 3, 0) == [[]] * 3
    assert model.generate([prompt] * 3, [0, 2, 0], temperature=0) == [[], full[:2], []]


def test_a_sample_does_not_depend_on_its_batch(model):
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1, 60, 8)]
    together = model.generate(prompts, 25, seeds=[9, 8, 7, 6, 5, 4], top_p=0.9, batch_size=4)
    alone = [
        model.generate([p], 25, seeds=[s], top_p=0.9)[0]
        for p, s in zip(prompts, [9, 8, 7, 6, 5, 4])
    ]
    assert together == alone
    assert (
        model.generate(prompts[:1], 25, seeds=[1])[0]
        != model.generate(prompts[:1], 25, seeds=[2])[0]
    )


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_looking_at_the_tokens_once_a_chunk_changes_nothing(model, temperature):
    """As on CUDA, where 16 steps are taken before the host sees a token: rows end anywhere within a
    chunk."""
    prompts = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1, 90, 8, 93)]
    most = [25, 3, 17, 25, 25, 1, 25]  # the fifth and the last end at block_size
    seen = {}
    call = lambda chunk: model.generate(
        prompts,
        most,
        temperature=temperature,
        top_p=0.9,
        batch_size=3,
        chunk=chunk,
        stop_tokens=range(0, 320, 16),
        stop=lambda new: new[-1] % 16 == 1,
        on_token=lambda i, t: seen.setdefault((chunk, i), []).append(t),
    )
    one, five = call(1), call(5)
    assert (
        one == five
        and all(len(x) <= n for x, n in zip(one, most))
        and len(one[4]) <= 6
        and len({*map(len, one)}) > 2
    )
    assert all(seen[1, i] == seen[5, i] == x + [None] for i, x in enumerate(one))


def test_samples_of_one_prompt_share_its_cache_and_nothing_else(model, monkeypatch):
    prompts = [p for p in (torch.randint(320, (n,)).tolist() for n in (20, 33)) for _ in range(5)]
    most = [9, 15, 4, 11, 15, 7, 15, 9, 12, 15]
    alone = [model.generate([p], n, seeds=[s])[0] for s, (p, n) in enumerate(zip(prompts, most))]
    assert (
        model.generate(prompts, most, batch_size=4) == alone and len(set(map(tuple, alone))) == 10
    )
    computed, hidden = [], GPT.hidden
    monkeypatch.setattr(
        GPT,
        "hidden",
        lambda self, idx, *args: computed.append(idx.shape) or hidden(self, idx, *args),
    )
    assert model.generate(prompts, most) == alone
    assert (
        sum(rows for rows, length in computed if length > 1) == 2
    )  # of ten prompts two were computed


@pytest.mark.parametrize("temperature, chunk", [(0, 1), (0, 5), (1.0, 1), (1.0, 5)])
def test_what_a_check_refuses_is_drawn_again_in_its_place(model, temperature, chunk):
    torch.manual_seed(3)
    prompts, seen, asked = [torch.randint(320, (n,)).tolist() for n in (5, 30, 12, 1)], {}, {}
    asking = range(0, 320, 2 if temperature else 1)

    def check(
        i, new
    ):  # the first two lists of at least eight go back to three tokens, then all is well
        assert new == seen[i] and new[-1] in asking
        if len(new) > 7:
            asked.setdefault(i, []).append(list(new))
            return 3 if len(asked[i]) < 3 else None

    def on_token(i, token):
        if token is not None and token < 0:
            del seen[i][token:]
        elif token is not None:
            seen.setdefault(i, []).append(token)

    def call(which, chunk):
        seen.clear(), asked.clear()
        return model.generate(
            [prompts[i] for i in which],
            30,
            temperature=temperature,
            seeds=which,
            chunk=chunk,
            check_tokens=asking,
            check=check,
            on_token=on_token,
            batch_size=3,
        )

    out = call(range(4), chunk)
    tried = dict(asked)
    assert out == [seen[i] for i in range(4)] and list(map(len, out)) == [30] * 4 == [
        len(seen[i]) for i in range(4)
    ]
    for (one, two, three, *_), o in zip((tried[i] for i in range(4)), out):
        assert one[:3] == two[:3] == three[:3] and three == o[: len(three)]
    assert any(two not in (one, three) for one, two, three, *_ in tried.values())
    assert [call([i], chunk)[0] for i in range(4)] == out  # its draws are its own
    if not temperature:  # argmax up to the refusal, and again after the check that kept what it saw
        for i, (p, o) in enumerate(zip(prompts, out)):
            first, last = tried[i][0], len(tried[i][2])
            assert first == greedy(model, p, len(first)) and o[last:] == greedy(
                model, p + o[:last], 30 - last
            )
    else:  # the cache holds nothing of what was dropped
        with torch.no_grad():
            scores = [
                model(torch.tensor([p + o]))[0][0, len(p) - 1 : -1].log_softmax(-1)
                for p, o in zip(prompts, out)
            ]
        assert all(s.gather(1, torch.tensor(o)[:, None]).min() > -25 for s, o in zip(scores, out))


def test_what_is_drawn_again_follows_the_model(model):
    """Whatever was refused before it, the second token is drawn from what the model says after the
    first."""
    prompt, tries = [5, 6, 7], {}

    def check(i, new):
        if len(new) == 4 and i not in tries:
            tries[i] = new[1:]
            return 1

    out = model.generate(
        [prompt] * 3000, 5, check_tokens=range(320), check=check, batch_size=500, temperature=0
    )
    assert len({o[0] for o in out}) == 1 and len(tries) == 3000
    p = model(torch.tensor([prompt + out[0][:1]]))[0][0, -1].detach().softmax(-1)
    count = torch.bincount(torch.tensor(out)[:, 1], minlength=320)
    common = p > 0.002
    chi2 = ((count - 3000 * p) ** 2 / (3000 * p))[common].sum().item()
    n = int(common.sum())
    assert n > 20 and chi2 < n + 5 * (2 * n) ** 0.5


def test_sampling_follows_the_nucleus():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])
    u = (torch.arange(20_000) + 0.5) / 20_000

    def draw(top_p, temperature=1.0):
        drawn = sample_tokens(
            p.log().expand(20_000, 4), torch.full((20_000,), temperature), top_p, u
        )
        return torch.bincount(drawn, minlength=4) / 20_000

    assert torch.allclose(draw(1.0), p, atol=1e-3)
    assert torch.allclose(
        draw(0.7), torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=1e-3
    )  # 0.5 + 0.25 >= 0.7
    assert torch.allclose(draw(1.0, 0.5), p**2 / (p**2).sum(), atol=1e-3)
    likeliest = torch.tensor([0.0, 1, 0, 0])
    for top_p, temperature in (
        (0.0, 1.0),
        (0.4, 1.0),
        (1.0, 0.0),
        (0.5, 0.0),
        (1.0, 1e-30),
        (0.9, 1e-4),
    ):
        assert torch.equal(draw(top_p, temperature), likeliest)
    even = sample_tokens(torch.zeros(100, 1000), torch.ones(100), 0.0, torch.linspace(0, 1, 100))
    assert len(set(even.tolist())) == 1
    last = sample_tokens(p.log().expand(2, 4), torch.ones(2), 0.7, torch.tensor([1 - 2**-53, 1.0]))
    assert last.tolist() == [3, 3]  # not what lies outside of the nucleus


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])  # from flat to peaked
def test_drawn_are_the_inverse_of_the_distribution_over_the_nucleus(top_p, spread):
    torch.manual_seed(1)
    logits, u = torch.randn(200, 5000) * spread + torch.arange(5000) * -1e-6, torch.rand(200)
    drawn = sample_tokens(logits, torch.ones(200), top_p, u)[:, None]
    p, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    nucleus = torch.zeros_like(p).scatter(1, order, p * (p.cumsum(-1) - p < top_p))
    nucleus /= nucleus.sum(-1, keepdim=True)
    share, reach = nucleus.gather(1, drawn)[:, 0], nucleus.cumsum(-1).gather(1, drawn)[:, 0]
    assert (reach > u - 2e-3).all() and (reach - share < u + 2e-3).all()
    assert share.gt(0).float().mean() > 0.99  # up to rounding at its edge


def test_what_is_drawn_does_not_depend_on_the_other_rows():
    torch.manual_seed(2)
    logits = torch.cat((torch.randn(20, 3000) * 3, torch.zeros(1, 3000))).bfloat16().float()
    u, ones = torch.rand(21), torch.ones(21)  # bfloat16's are coarse: many are equally likely
    together = sample_tokens(logits, ones, 0.95, u)
    alone = [sample_tokens(logits[i:i + 1], ones[:1], 0.95, u[i:i + 1]) for i in range(21)]
    assert torch.equal(together, torch.cat(alone))
