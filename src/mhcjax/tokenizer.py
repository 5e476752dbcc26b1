"""Byte-level tokenizers: text to ids and back, exactly. V vocabulary.

ids 0 to 255 are the bytes, 256 ends a document, the merges of BPE follow
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Tokenizer", "byte_tokenizer", "load_tokenizer", "train_bpe"]

END = 256  # id of the end token
_PIECE = 1 << 20  # characters that the BPE takes at a time, so that one huge file fits in memory


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer of V = `vocab` ids; without merges, the byte tokenizer.

    `merges` are the pairs of byte strings that BPE joins, in order of priority. Ids beyond the last
    merge are unused: they stand for no text and are never produced. Before merging, text is cut
    into words by the pattern of GPT-2, and where it is longer than 2**20 characters into pieces at
    line boundaries.

    The end token has no spelling: no text, whatever it holds, encodes to its id, and for every str
    `decode(encode(text)) == text`.

    >>> t = Tokenizer(259, ((b"a", b"b"), (b"ab", b"c")))
    >>> t.encode("abcab").tolist(), t.decode([258, 257, 256])
    ([258, 257], 'abcab')

    ValueError: a vocabulary too small for bytes, end and merges, or a merge of unknown tokens.
    """

    vocab: int
    merges: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        known = {bytes([b]) for b in range(256)}
        for left, right in self.merges:
            if left not in known or right not in known:
                raise ValueError(
                    f"the merge of {left!r} and {right!r} joins tokens that no earlier merge made: "
                    f"give the merges in order of priority"
                )
            known.add(left + right)
        least = len(known) + 1
        if self.vocab < least:
            raise ValueError(
                f"the vocabulary is {self.vocab}, and 256 bytes, {len(known) - 256} merged tokens "
                f"and the end token need {least}: set --model.vocab to {least} or more"
            )

    @property
    def end(self) -> int:
        """Id of the end token.

        >>> byte_tokenizer().end
        256
        """
        return END

    @functools.cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for; none for the end token and for unused ids.

        >>> byte_tokenizer().tokens[97], byte_tokenizer().tokens[256]
        (b'a', b'')
        """
        # Two merges may make the same token: it has one id, that of the first.
        merged = dict.fromkeys(left + right for left, right in self.merges)
        used = [*(bytes([b]) for b in range(256)), b"", *merged]
        return tuple(used + [b""] * (self.vocab - len(used)))

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int64[V], how many bytes of text each id stands for: the weights of bits per byte.

        >>> byte_tokenizer().token_bytes[[97, 256]].tolist()
        [1, 0]
        """
        sizes = np.array([len(token) for token in self.tokens])
        sizes.flags.writeable = False
        return sizes

    @property
    def unused(self) -> int:
        """How many ids stand for nothing because the corpus was too small to fill the vocabulary.

        >>> Tokenizer(300).unused
        43
        """
        return self.tokens.count(b"") - 1

    def encode(self, text: str) -> np.ndarray:
        """int32[tokens], without an end token.

        >>> byte_tokenizer().encode("hé").tolist()
        [104, 195, 169]

        ValueError: lone surrogates, which UTF-8 can't hold.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is the lone surrogate "
                f"{text[error.start]!r}: give text.encode('utf-8', 'replace').decode() instead"
            ) from None
        if not self.merges:
            return np.frombuffer(data, np.uint8).astype(np.int32)
        ids, pieces = [np.zeros(0, np.int32)], _pieces(text)
        while some := list(itertools.islice(pieces, 16)):  # encoded at once, on all cores
            encoded = self._backend.encode_batch_fast(some, add_special_tokens=False)
            ids += [np.array(e.ids, np.int32) for e in encoded]
        return np.concatenate(ids)

    def decode(self, ids: ArrayLike) -> str:
        """The text of some ids, without the end token and unused ids.

        Bytes that are not UTF-8, such as half a character, become U+FFFD.

        >>> byte_tokenizer().decode([104, 195, 169, 256])
        'hé'

        ValueError: an id outside the vocabulary, or ids that are not integers.
        """
        flat = np.asarray(ids).reshape(-1)
        if not flat.size:
            return ""
        if not np.issubdtype(flat.dtype, np.integer):
            raise ValueError(f"the ids are of type {flat.dtype}: give integers")
        wrong = flat[(flat < 0) | (flat >= self.vocab)]
        if wrong.size:
            raise ValueError(
                f"id {wrong[0]} is outside the vocabulary: give ids from 0 to {self.vocab - 1}"
            )
        return b"".join(self.tokens[i] for i in flat.tolist()).decode("utf-8", "replace")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json that Hugging Face `tokenizers` reads as well, atomically.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     byte_tokenizer().save(f"{folder}/t.json")
        ...     load_tokenizer(f"{folder}/t.json") == byte_tokenizer()
        True
        """
        path = Path(path)
        work = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            work.write_text(json.dumps(self._tree(), ensure_ascii=False, indent=1) + "\n", "utf-8")
            os.replace(work, path)
        finally:
            work.unlink(missing_ok=True)

    @functools.cached_property
    def _backend(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(json.dumps(self._tree()))

    def _tree(self) -> dict[str, Any]:
        # A name with a space is never the spelling of text, where a space is another character. And
        # it is not among `added_tokens`, which would be searched for in the text.
        names = [_spell(token) or f"<unused {i}>" for i, token in enumerate(self.tokens)]
        names[END] = "<end of document>"
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {**level, "use_regex": True},
            "post_processor": None,
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": [[_spell(left), _spell(right)] for left, right in self.merges],
            },
        }


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of 256 bytes and the end token.

    >>> byte_tokenizer().vocab
    257
    """
    return Tokenizer(257)


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of `vocab` ids, learnt from texts.

    The same texts in the same order give the same merges. Pairs seen only once are not merged, so a
    tiny corpus leaves ids unused.

    >>> train_bpe(["low lower lowest\\n"], 300).encode("lowest").size < 6
    True

    ValueError: vocab < 257.
    """
    Tokenizer(vocab)  # refuses one too small before the work
    import tokenizers

    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab - 1,  # the end token is ours
        min_frequency=2,
        initial_alphabet=list(_SPELLING),
        show_progress=False,
    )
    learner.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return Tokenizer(vocab, _merges(json.loads(learner.to_str())))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; anything else is refused.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train_bpe(["a b a b"], 260).save(f"{folder}/t.json")
    ...     load_tokenizer(f"{folder}/t.json").vocab
    260

    ValueError: no such file, not JSON, or not exactly what `save` writes.
    """
    try:
        tree = json.loads(Path(path).read_text("utf-8"))
        tokenizer = Tokenizer(len(tree["model"]["vocab"]), _merges(tree))
        # as text: 0 == False
        if json.dumps(tokenizer._tree(), sort_keys=True) != json.dumps(tree, sort_keys=True):
            raise ValueError("it differs from what its own merges give")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a tokenizer of this library ({type(error).__name__}: {error}): "
            f"restore the file or build it again"
        ) from None
    return tokenizer


def _merges(tree: dict[str, Any]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((_unspell(left), _unspell(right)) for left, right in tree["model"]["merges"])


def _spelling() -> dict[str, int]:
    # GPT-2's alphabet: a printable character for each byte, so that merges are readable JSON
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_SPELLING = _spelling()
_CHARACTER = {b: c for c, b in _SPELLING.items()}


def _spell(token: bytes) -> str:
    return "".join(_CHARACTER[b] for b in token)


def _unspell(name: str) -> bytes:
    return bytes(_SPELLING[c] for c in name)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
