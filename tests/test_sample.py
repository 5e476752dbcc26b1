"""Sampling: what may be drawn, what the text is, and that nothing depends on the company it keeps.

The model is a small random one over bytes. Where the test decides what is drawn, `choose` is
replaced by a script and everything else is the real thing.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mhcjax import gpt, sample
from mhcjax.config import ModelConfig
from mhcjax.sample import Settings, choose, generate, keep_mask


class Bytes:
    """Bytes as tokens; the end token comes after them."""

    end = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")


CONFIG = ModelConfig(layers=1, width=16, heads=2, hidden=32, vocab=257, context=24)
GRAPHDEF, PARAMS = gpt.build(replace(CONFIG, embedding_std=0.5), key=jax.random.key(0))
GRAPHDEF = gpt.graph(CONFIG)


def run(prompts, **options):
    return generate(GRAPHDEF, PARAMS, CONFIG, Bytes(), prompts, **options)


@jax.jit
def training_logits(params, tokens_BT):
    return nnx.merge(GRAPHDEF, params)(tokens_BT)


@pytest.fixture
def scripted(monkeypatch):
    """scripted([tokens of row 0, ...]): what the rows draw, whatever the model says."""

    def play(rows):
        steps = iter(range(10**6))

        def scripted_choose(logits, _settings, _keys):
            assert logits.shape == (len(rows), CONFIG.vocab)
            step = next(steps)
            return np.array([row[step] if step < len(row) else 0 for row in rows])

        monkeypatch.setattr(sample, "choose", scripted_choose)

    return play


# --------------------------------------------------------------------------------------------------
# What survives the filters


def numpy_keep(logits, top_k, top_p, min_p):
    """(kept, sure): in float64 by the definitions; not sure where rounding decides."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    probability = weights / weights.sum()
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))  # ties: the lower token first
    kept, sure = np.zeros(len(logits), bool), np.ones(len(logits), bool)
    before = 0.0
    for rank, v in enumerate(order):
        by_k = top_k == 0 or rank < top_k
        by_p = top_p >= 1 or before < top_p
        by_min = probability[v] >= min_p * probability.max() or logits[v] == logits.max()
        kept[v] = rank == 0 or (by_k and by_p and by_min)
        near_p = top_p < 1 and abs(before - top_p) < 1e-5
        near_min = abs(probability[v] / probability.max() - min_p) < 1e-5
        if rank and (near_p or (near_min and logits[v] != logits.max())):
            sure[v] = False
        before += probability[v]
    return kept, sure


# Quarters, so that ties are frequent; extremes, so that probabilities vanish.
one_logit = st.one_of(
    st.integers(-12, 12).map(lambda i: i / 4), st.sampled_from([-1e9, -80.0, 80.0])
)


@given(
    logits=st.lists(one_logit, min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.sampled_from([1e-6, 0.5, 0.999999, 1.0]), st.floats(0.0078125, 1, width=32)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
)
@example(logits=[0.0] * 4, top_k=2, top_p=1.0, min_p=0.0)
@example(logits=[0.0] * 4, top_k=0, top_p=0.6, min_p=1.0)
@example(logits=[1.0, 1.0, 0.0], top_k=0, top_p=1.0, min_p=1.0)
@example(logits=[-1e9, 0.0], top_k=0, top_p=1.0, min_p=0.0)
@settings(max_examples=200)
def test_keep_mask(logits, top_k, top_p, min_p):
    # One shape, one compilation: the rest is padding that no filter may keep before a real token.
    given_logits = np.float32(logits + [-2e9] * (12 - len(logits)))
    kept, sure = numpy_keep(given_logits, top_k, top_p, min_p)
    found = np.asarray(
        KEEP(given_logits, Settings(1.0, top_k, np.float32(top_p), np.float32(min_p)))
    )
    assert found.any() and found[given_logits.argmax()]
    assert (found == kept)[sure].all(), (found, kept)
    assume(sure.all())


KEEP = jax.jit(keep_mask)


def test_keep_mask_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    cases = {
        Settings(): [[1, 1, 1, 1], [1, 1, 1, 1]],
        Settings(top_k=1): [[0, 1, 0, 0], [1, 0, 0, 0]],
        Settings(top_k=3): [[0, 1, 1, 1], [1, 1, 1, 0]],
        Settings(top_k=9): [[1, 1, 1, 1], [1, 1, 1, 1]],
        # The smallest set that reaches the mass: the one that crosses it is in.
        Settings(top_p=0.7): [[0, 1, 0, 1], [1, 1, 1, 0]],
        Settings(top_p=0.01): [[0, 1, 0, 0], [1, 0, 0, 0]],
        Settings(min_p=0.4): [[0, 1, 0, 1], [1, 1, 1, 1]],
        Settings(min_p=1.0): [[0, 1, 0, 0], [1, 1, 1, 1]],
        Settings(top_k=3, top_p=0.7, min_p=0.6): [[0, 1, 0, 0], [1, 1, 1, 0]],
    }
    for setting, wanted in cases.items():
        assert keep_mask(logits, setting).tolist() == np.array(wanted, bool).tolist(), setting


def test_choose_draws_from_the_softmax():
    """20,000 draws: every share within 4.5 standard deviations, filtered tokens never."""
    probability = np.array([0.05, 0.3, 0.2, 0.45])
    keys = jax.random.split(jax.random.key(0), 20000)

    def shares(**options):
        logits = jnp.broadcast_to(jnp.log(probability), (20000, 4))
        drawn = choose(logits, Settings(**{"temperature": 1.0, **options}), keys)
        return np.bincount(drawn, minlength=4) / 20000

    def check(found, wanted):
        wanted = wanted / wanted.sum()
        sigma = np.sqrt(wanted * (1 - wanted) / 20000)
        assert (np.abs(found - wanted) <= 4.5 * sigma).all(), (found, wanted)

    check(shares(), probability)
    check(shares(top_k=2), probability * [0, 1, 0, 1])
    check(shares(temperature=2.0), np.sqrt(probability))
    check(shares(temperature=0.5), probability**2)
    # Temperature first: at 0.5 the largest two have mass 0.86, at 1 only 0.75.
    check(shares(temperature=0.5, top_p=0.8), probability**2 * [0, 1, 0, 1])
    check(shares(top_p=0.8), probability * [0, 1, 1, 1])
    assert shares(temperature=0.0)[3] == 1 and shares(temperature=1e-8)[3] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give a value at least 0"),
        ({"top_k": -1}, "top_k is -1: give a value at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0: give a value in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1.5: give a value in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1.5: give a value in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        run(["a"], settings=Settings(**options))


def test_requests_that_can_not_be():
    with pytest.raises(ValueError, match="tokens is -1"):
        run(["a"], tokens=-1)
    with pytest.raises(ValueError, match="a stop string is empty"):
        run(["a"], stop=("x", ""))
    assert run([]) == []
    (nothing,) = run(["a"], tokens=0)
    assert (nothing.text, nothing.tokens, nothing.finish) == ("", (), "length")


# --------------------------------------------------------------------------------------------------
# Greedy is the argmax of the training forward; a row is alone


def test_greedy_is_the_argmax_of_the_training_forward():
    prompts = ["", "def f", "the quick brown f"]
    found = run(prompts, tokens=30, settings=Settings(temperature=0.0))
    for prompt, generation in zip(prompts, found, strict=True):
        start = [Bytes.end, *prompt.encode()]
        # The last token drawn is never read again, and a stop token is not part of the tokens.
        read = [*start, *generation.tokens][: CONFIG.context]
        padded = np.zeros((1, CONFIG.context), np.int32)
        padded[0, : len(read)] = read
        best = np.asarray(training_logits(PARAMS, padded))[0].argmax(-1)
        drawn = [*generation.tokens, *([Bytes.end] if generation.finish == "stop" else [])]
        assert drawn == best[len(start) - 1 :][: len(drawn)].tolist()
        assert len(drawn) > 5 and generation.prompt == prompt


def test_same_seed_same_text_other_seed_other_text():
    first, again, other = (run(["ab", "c"], tokens=12, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first[0].tokens != other[0].tokens and first[1].tokens != other[1].tokens
    # Equal prompts in one batch draw from keys of their own.
    twins = run(["ab", "ab"], tokens=12)
    assert twins[0].tokens != twins[1].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(temperature):
    options = {"tokens": 10, "settings": Settings(temperature=temperature, top_p=0.95)}
    alone = run(["ab"], **options)[0]
    for others in (["x"], ["a longer neighbour", ""], ["zz", "y", "x", "w"]):
        assert run(["ab", *others], **options)[0] == alone
    # And the place in the batch is all that a seed sees of it.
    last = [run([first, "ab"], **options)[1] for first in ("", "0123456789012345678")]
    assert last[0] == last[1]


# --------------------------------------------------------------------------------------------------
# Lengths


@pytest.mark.parametrize("length", range(1, CONFIG.context + 1))
def test_every_prompt_length_up_to_a_full_context(length):
    """The start token counts. The last position that is read draws one more token: `context`."""
    (found,) = run(["a" * (length - 1)], tokens=100, settings=Settings(temperature=1.0))
    if found.finish == "context":
        assert len(found.tokens) == CONFIG.context - length + 1
    else:
        assert found.finish == "stop" and len(found.tokens) <= CONFIG.context - length


def test_context_and_length(scripted):
    scripted([b"x" * 50, b"y" * 50])
    full, short = run(["a" * 23, "b" * 20], tokens=100)
    assert (full.text, full.finish) == ("x", "context")
    assert (short.text, short.finish) == ("yyyy", "context")
    scripted([b"x" * 50, b"y" * 50])
    full, short = run(["a" * 23, "b"], tokens=3)
    assert (full.text, full.finish) == ("x", "context")
    assert (short.text, short.finish) == ("yyy", "length")


def test_a_prompt_that_does_not_fit():
    with pytest.raises(ValueError, match=r"prompt 1 has 25 tokens .* holds 24: shorten"):
        run(["a", "a" * 24])
    # Bytes count, not characters.
    with pytest.raises(ValueError, match="prompt 0 has 25 tokens"):
        run(["\u00e9" * 12])


def test_one_decode_step_for_every_length():
    """Another context, so that nothing is compiled yet; prefill has one program per power of 2."""
    config = replace(CONFIG, context=40)
    graphdef = gpt.graph(config)
    decodes, prefills = sample.decode_step._cache_size(), sample.prefill._cache_size()
    for length in range(1, 41):
        generate(graphdef, PARAMS, config, Bytes(), ["a" * (length - 1)], tokens=3, seed=length)
    for options in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        generate(graphdef, PARAMS, config, Bytes(), ["abc"], tokens=3, settings=Settings(**options))
    assert sample.decode_step._cache_size() == decodes + 1
    assert sample.prefill._cache_size() == prefills + 3  # 16, 32, 40


def test_caches_are_donated():
    cache = gpt.empty_cache(CONFIG, 1)
    one = np.ones(1, np.int32)
    _, after = sample.prefill(GRAPHDEF, PARAMS, np.zeros((1, 16), np.int32), one, cache)
    assert cache.key.is_deleted() and cache.value.is_deleted()
    sample.decode_step(GRAPHDEF, PARAMS, one, one, after)
    assert after.key.is_deleted() and after.value.is_deleted()


# --------------------------------------------------------------------------------------------------
# Text: stop token, stop strings, streaming


def stream(scripted, rows, prompts=None, **options):
    """(generations, pieces per row)"""
    scripted(rows)
    pieces = [[] for _ in rows]
    found = run(
        prompts or [""] * len(rows),
        on_text=lambda row, piece: pieces[row].append(piece),
        **{"tokens": 20, **options},
    )
    return found, pieces


def test_stop_token_ends_its_row_only(scripted):
    (first, second), pieces = stream(scripted, [[*b"ab", 256, *b"cd"], b"efghi"], tokens=5)
    assert (first.text, first.finish, first.tokens) == ("ab", "stop", tuple(b"ab"))
    assert (second.text, second.finish) == ("efghi", "length")
    assert ["".join(p) for p in pieces] == ["ab", "efghi"]


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (("END",), "one two "),
        (("o t",), "one two END three"[:2]),  # an earlier piece of it stands at "one"
        (("e",), "on"),
        (("nothing",), "one two END three"),
        (("END", "two"), "one "),
        (("END three",), "one two "),
        (("one",), ""),
    ],
)
def test_stop_strings_across_tokens(scripted, stop, wanted):
    script = b"one two END three"
    ((found,), (pieces,)) = stream(scripted, [script], stop=stop, tokens=len(script))
    if stop == ("o t",):
        assert (found.text, found.finish) == ("one two END three", "length")
    else:
        assert found.text == wanted
        assert found.finish == ("length" if stop == ("nothing",) else "stop")
    assert "".join(pieces) == found.text and all(pieces)


@given(
    script=st.lists(st.sampled_from([*b"ab", *"\u00e9\u20ac\U0001f600".encode()]), max_size=20),
    stop=st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=2),
)
@example(script=[*"\U0001f600".encode()], stop=[])
@example(script=[*"a\U0001f600b".encode()], stop=["\U0001f600b"])
@example(script=[0xE2, 0x82, *b"a"], stop=["a"])
@settings(max_examples=60)
def test_streamed_pieces_join_to_the_text(script, stop):
    """Any bytes, valid UTF-8 or not, and any stop strings, by definition in plain Python."""
    pieces = []
    row = sample._Stream(Bytes(), tuple(stop), 0, lambda _, piece: pieces.append(piece))
    for i, token in enumerate(script):
        row.push(token, full=False)
        text = Bytes().decode(script[: i + 1])
        if any(s in text for s in stop):
            wanted, finish = text[: min(text.find(s) for s in stop if s in text)], "stop"
            break
        # What has been shown never changes and never holds a part of what is cut off.
        assert text.startswith("".join(pieces))
    else:
        wanted, finish = Bytes().decode(script), "length"
    found = row.result("p")
    assert (found.text, found.finish, found.prompt) == (wanted, finish, "p")
    assert "".join(pieces) == wanted and all(pieces)
    assert not any(s in "".join(pieces) for s in stop)


def test_multi_byte_characters_stream_whole(scripted):
    text = "a\u00e9\u20ac\U0001f600z"
    ((found,), (pieces,)) = stream(scripted, [[*text.encode(), 256]])
    assert found.text == text and pieces == list(text)


def test_text_appears_as_soon_as_it_can(scripted):
    """Without stop strings every character at once; with one of n characters, n - 1 later."""
    ((_,), (pieces,)) = stream(scripted, [b"abcdef"], tokens=6)
    assert pieces == list("abcdef")
    ((_,), (pieces,)) = stream(scripted, [b"abcdef"], tokens=6, stop=("xyz",))
    assert pieces == ["a", "b", "c", "d", "ef"]
    ((found,), (pieces,)) = stream(scripted, [b"abxyz"], tokens=6, stop=("xyz",))
    assert found.text == "ab" and pieces == ["a", "b"]


def test_an_unfinished_character_at_the_end_is_shown_as_such(scripted):
    ((found,), (pieces,)) = stream(scripted, [[*b"a", 0xE2, 0x82]], tokens=3)
    assert found.text == "a\ufffd" == "".join(pieces) and pieces[0] == "a"


def test_the_end_token_comes_before_every_prompt(monkeypatch):
    """A prompt starts a document, as in training."""
    seen = []
    real = sample.prefill

    def spy(graphdef, params, tokens, lengths, cache):
        seen.append((tokens.copy(), lengths.copy()))
        return real(graphdef, params, tokens, lengths, cache)

    monkeypatch.setattr(sample, "prefill", spy)
    run(["ab", ""], tokens=1)
    tokens, lengths = seen[0]
    assert tokens.shape == (2, 16) and lengths.tolist() == [3, 1]
    assert tokens[0, :3].tolist() == [256, 97, 98] and tokens[1, 0] == 256


def test_padded_tokens_are_never_drawn():
    """Storage holds 384 tokens, the vocabulary 257: at any temperature nothing above 256."""
    assert PARAMS["embedding"].shape == (384, 16)
    for seed in range(3):
        for g in run(["a", "b", "c", "d"], seed=seed, settings=Settings(temperature=1e6)):
            assert all(0 <= t < 256 for t in g.tokens)
