"""sample.py: what constrained decoding lets a model write."""
import random

import pytest

import lintseq
import prepare
import sample

PROGRAM = "import os\n\n\ndef f(x):\n    if x:\n        return os.sep\n    return [\n        x,\n    ]\n\n\nprint(f(1))\n"


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "small.tiktoken"
    prepare.train_tokenizer(path, [PROGRAM * 20], 300)
    return prepare.get_tokenizer(str(path))


def response(seed):
    return lintseq.training_text("f", lintseq.lintseq(PROGRAM, random.Random(seed)))[1]


def test_every_sequence_of_lintseq_is_allowed(enc):
    for seed in range(30):
        guide, ids = sample.Guide(enc, retries=2), enc.encode(response(seed), allowed_special="all")
        assert all(guide(token, n) in (None, n + 1) for n, token in enumerate(ids))
        assert guide.tries == 0


def test_no_allowed_sequence_is_malformed(enc):
    """A writer that knows the format but neither numbers nor places: whatever is allowed applies."""
    rng, specials = random.Random(0), [enc.eot_token, enc.encode_single_token(prepare.DIFF)]
    words = ["@@ -", ",0 +", ",", " @@\n+", "\n", "\n+", "x = 1", "@", "+", "<", " @@", "@@ -0,0 +1", *map(str, range(12))]
    words = [enc.encode(w) for w in words] + [[s] for s in specials * 2]
    whole = 0
    for _ in range(60):
        guide, tokens = sample.Guide(enc), []
        for _ in range(3000):
            for token in rng.choice(words):
                if guide(token, len(tokens)) is False:
                    break
                tokens.append(token)
            if tokens[-1:] == [enc.eot_token]:
                program, report = lintseq.apply_report(enc.decode(tokens[:-1]))
                assert report["malformed"] == 0 and report["hunks"]
                whole += 1
                break
    assert whole > 10


@pytest.mark.parametrize("text", ["@@ -1", "@@ -0,0 +2", "@@ -0,0 +1,1 ", "@@ -0,0 +1,0", "@@ -0,0 +1,2 @@\n+a\n@", "\n",
                                  "@@ -0,0 +1 @@\n+a\n+", "@@ -0,0 +1 @@\n+a\n@", "-", "@@ -0,0 +1,2 @@\n+a\n-", "x"])
def test_what_cannot_apply_is_refused_at_its_last_character(enc, text):
    guide, answers = sample.Guide(enc), []
    for n, byte in enumerate(text.encode()):
        answers.append(guide(enc.encode_single_token(bytes([byte])), n))
    assert answers[-1] is False and not any(a is False for a in answers[:-1])


def test_an_edit_with_linter_errors_is_drawn_again_a_bounded_number_of_times(enc):
    good, bad = "@@ -0,0 +1 @@\n+x = 1\n<|diff|>", "@@ -1,0 +2 @@\n+print(y)\n<|diff|>"
    encode = lambda text: enc.encode(text, allowed_special="all")
    guide, n = sample.Guide(enc, retries=2), len(encode(good))
    assert [guide(t, k) for k, t in enumerate(encode(good))][-1] == n
    answers = [[guide(t, n + k) for k, t in enumerate(encode(bad))][-1] for _ in range(3)]
    assert answers == [n, n, n + len(encode(bad))]
    assert guide.now[2] == ["x = 1", "print(y)"]
