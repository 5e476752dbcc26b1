"""Sampling: prefill, single-token decode, generate. The forward pass is the model's own.

The two compiled programs are module functions with the graph definition as a static argument: one
prefill per power of two of prompt length, one decode step for every length up to the context.

Axis key: B sequence, T position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhcjax import gpt, processes
from mhcjax.config import ModelConfig

__all__ = [
    "Generation",
    "Settings",
    "choose",
    "decode_step",
    "generate",
    "keep_mask",
    "prefill",
]


class Settings(NamedTuple):
    """How the next token is drawn; plain scalars, so that changing one compiles nothing.

    Temperature first, then the filters, all on the scaled distribution. `temperature` 0 is greedy;
    `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self) -> Settings:
        """Itself; a ValueError names the value that is out of range."""
        for name, good, want in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}: give a value {want}")
        return self


@dataclass(frozen=True)
class Generation:
    """One continuation. `finish` says why it ended: stop, length or context."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish: str


def keep_mask(logits: jax.Array, settings: Settings) -> jax.Array:
    """Which tokens of (scaled) logits[..., V] survive top-k, top-p and min-p; never none.

    top-p keeps the smallest set, by falling probability, that reaches mass `top_p`.

    >>> keep_mask(jnp.log(jnp.array([0.1, 0.6, 0.3])), Settings(top_p=0.7)).tolist()
    [False, True, True]
    """
    order = jnp.argsort(-logits, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    rank = jnp.arange(logits.shape[-1])
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = jnp.where(settings.top_k > 0, rank < settings.top_k, True)
    # A full top_p keeps all, whatever the rounding of the running sum.
    keep &= (before < settings.top_p) | (settings.top_p >= 1)
    keep &= probability >= settings.min_p * probability[..., :1]
    keep |= rank == 0
    return jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)


@jax.jit
def choose(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
    """The next token of every row, one key a row; -> int32[B].

    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> choose(jnp.array([[0.0, 9.0]]), Settings(temperature=0), keys).tolist()
    [1]
    """
    scaled = logits_BV / jnp.maximum(settings.temperature, 1e-6)
    filtered = jnp.where(keep_mask(scaled, settings), scaled, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys_B, filtered)
    greedy = jnp.argmax(logits_BV, axis=-1)
    return jnp.where(settings.temperature > 0, drawn, greedy).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def prefill(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    cache: gpt.Cache,
) -> tuple[jax.Array, gpt.Cache]:
    """Read right-padded prompts; -> (logits after each row's last token[B, V], cache).

    Padding writes to positions that decoding overwrites before it can attend to them.
    """
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    h, cache = model.features(tokens_BT, positions_BT=positions, cache=cache)
    last = jnp.take_along_axis(h, (lengths_B - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], cache


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def decode_step(
    graphdef: nnx.GraphDef, params: Any, token_B: jax.Array, position_B: jax.Array, cache: gpt.Cache
) -> tuple[jax.Array, gpt.Cache]:
    """One token a row at its own position; -> (logits after it[B, V], cache)."""
    model = nnx.merge(graphdef, params)
    h, cache = model.features(token_B[:, None], positions_BT=position_B[:, None], cache=cache)
    return model.logits(h)[:, 0], cache


@jax.jit
def _row_keys(key: jax.Array, step: jax.Array, rows: jax.Array) -> jax.Array:
    """A key per row and step, the same whatever else is in the batch."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)


def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int = 128,
    settings: Settings | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue every prompt by up to `tokens` tokens.

    Each prompt starts a document (the end token comes before it). A row ends at the end token, at a
    stop string (not part of the text), after `tokens` tokens, or when the context is full.
    `on_text(row, piece)` streams the text as soon as it can no longer change.

    Raises ValueError where a prompt does not fit into the context or a setting is out of range.
    """
    settings = (settings or Settings()).check()
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}: give at least 0")
    if any(not s for s in stop):
        raise ValueError("a stop string is empty: every text would end at once")
    ids = [[tokenizer.end, *map(int, tokenizer.encode(p))] for p in prompts]
    lengths = np.array([len(row) for row in ids], np.int32)
    if not len(ids):
        return []
    longest = int(lengths.max())
    if longest > config.context:
        raise ValueError(
            f"prompt {int(lengths.argmax())} has {longest} tokens with the start token, "
            f"the context holds {config.context}: shorten the prompt"
        )
    bucket = min(config.context, max(16, 1 << (longest - 1).bit_length()))
    padded = np.zeros((len(ids), bucket), np.int32)
    for row, prompt in enumerate(ids):
        padded[row, : len(prompt)] = prompt
    streams = [_Stream(tokenizer, stop, row, on_text) for row in range(len(ids))]
    logits, cache = prefill(graphdef, params, padded, lengths, gpt.empty_cache(config, len(ids)))
    key, rows = jax.random.key(seed), np.arange(len(ids))
    for step in range(tokens):
        token = choose(logits, settings, _row_keys(key, step, rows))
        for stream, t, length in zip(streams, processes.whole(token), lengths, strict=True):
            stream.push(int(t), full=length + step + 1 > config.context)
        if all(stream.finish for stream in streams) or step + 1 == tokens:
            break
        # Rows that are full have finished; their position is clamped only to stay in the cache.
        position = np.minimum(lengths + step, config.context - 1).astype(np.int32)
        logits, cache = decode_step(graphdef, params, token, position, cache)
    return [s.result(p) for s, p in zip(streams, prompts, strict=True)]


class _Stream:
    """Text of one row: decoded as it grows, held back while a stop string may be forming."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], row: int, on_text: Callable | None
    ) -> None:
        self.tokenizer, self.stop, self.row, self.on_text = tokenizer, stop, row, on_text
        self.tokens: list[int] = []
        self.text, self.sent, self.finish = "", 0, ""

    def push(self, token: int, *, full: bool) -> None:
        if self.finish:
            return
        if token == self.tokenizer.end:
            self._end("stop")
            return
        self.tokens.append(token)
        self.text = self.tokenizer.decode(np.array(self.tokens))
        found = [self.text.find(s) for s in self.stop if s in self.text]
        if found:
            self.text = self.text[: min(found)]
            self._end("stop")
        elif full:
            self._end("context")
        else:
            # An unfinished character decodes to U+FFFD and a stop string may still be growing.
            held = max((len(s) - 1 for s in self.stop), default=0)
            self._send(len(self.text.rstrip("\ufffd")) - held)

    def _end(self, why: str) -> None:
        self.finish = why
        self._send(len(self.text))

    def _send(self, upto: int) -> None:
        if upto > self.sent:
            if self.on_text is not None:
                self.on_text(self.row, self.text[self.sent : upto])
            self.sent = upto

    def result(self, prompt: str) -> Generation:
        if not self.finish:
            self._end("length")
        return Generation(prompt, self.text, tuple(self.tokens), self.finish)
