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
        assert all(guide(ids[:n], token) in (None, ids[:n + 1]) for n, token in enumerate(ids))
        assert guide.tries == 0


def write(guide, tokens, token):
    """What generate makes of the guide's answer: the new tokens, or None where the token is refused."""
    answer = guide(tokens, token)
    return None if answer is False else tokens + [token] if answer is None else answer


def test_no_allowed_sequence_is_malformed(enc):
    """A writer that knows the format but neither numbers nor places: whatever is allowed applies."""
    rng, specials = random.Random(0), [enc.eot_token, enc.encode_single_token(prepare.DIFF)]
    words = ["@@ -", ",0 +", ",", " @@\n+", "\n", "\n+", "x = 1", "é@", "+", "<", " @@", "@@ -0,0 +1", *map(str, range(12))]
    words = [enc.encode(w) for w in words] + [[s] for s in specials * 2]
    whole = edits = 0
    for _ in range(60):
        guide, tokens = sample.Guide(enc), []
        for _ in range(3000):
            for token in rng.choice(words):
                now = write(guide, tokens, token)
                if now is None:
                    break
                tokens = now
            if tokens[-1:] == [enc.eot_token]:
                report = lintseq.apply_and_count(enc.decode(tokens[:-1]))[1]
                assert report["malformed"] == 0 and report["hunks"]
                whole, edits = whole + 1, edits + report["edits"]
                break
    assert whole > 10 and edits > 20


@pytest.mark.parametrize("text", ["@@ -1", "@@ -0,0 +2", "@@ -0,0 +1,1 ", "@@ -0,0 +1,0", "@@ -0,0 +1,2 @@\n-", "\n", "-", "x",
                                  "@@ -0,0 +1 @@\n+a\n@", "@@ -0,0 +1 @@\n+a\n-", "@@ -0,0 +1 @@\n+a\n<|diff|>@@ -2"])
def test_what_cannot_apply_is_refused_at_its_last_character(enc, text):
    guide, tokens = sample.Guide(enc), []
    for byte in text.encode():
        assert tokens is not None
        tokens = write(guide, tokens, enc.encode_single_token(bytes([byte])))
    assert tokens is None


@pytest.mark.parametrize("said", ["", ",2", ",4", ",77"])
@pytest.mark.parametrize("end", ["<|diff|>", "@@ -0,0"])
def test_a_header_with_a_wrong_number_of_lines_is_put_right(enc, said, end):
    first = "@@ -0,0 +1,2 @@\n+a = 1\n+b = 2\n<|diff|>"
    text = f"@@ -0,0 +1{said} @@\n+x = 1\n+y = 'é'\n+z = 3\n" + end.replace("-0,0", "-1,0 +5 @@\n+w = 4\n<|diff|>")
    guide, tokens = sample.Guide(enc), []
    for token in enc.encode(first + text, allowed_special="all"):
        tokens = write(guide, tokens, token)
    right = text.replace(f"+1{said} @@", "+1,3 @@", 1)
    assert tokens == enc.encode(first + right, allowed_special="all")
    assert guide.now[0][0] == "edge" and "\n".join(guide.now[2]) == lintseq.apply_edits(first + right)


def test_an_edit_with_linter_errors_is_drawn_again_a_bounded_number_of_times(enc):
    encode = lambda text: enc.encode(text, allowed_special="all")
    guide, tokens, bad = sample.Guide(enc, retries=2), [], encode("@@ -1,0 +2 @@\n+print(y)\n<|diff|>")
    for token in encode("@@ -0,0 +1 @@\n+x = 1\n<|diff|>"):
        tokens = write(guide, tokens, token)
    good = list(tokens)
    for expected in (good, good, good + bad):
        for token in bad:
            tokens = write(guide, tokens, token)
        assert tokens == expected
    assert "".join(guide.now[2]) == "x = 1print(y)"
