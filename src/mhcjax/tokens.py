"""Text to token shards: corpora, the train and validation split, tokenizers, a cache on disk.

    build("stdlib", "bpe", 4096) -> Corpus: train.bin, validation.bin, tokenizer.json, meta.json

A shard is a flat little-endian array of ids in which every document is followed by the end token.
V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "Corpus",
    "Document",
    "SyntheticCode",
    "Tokenizer",
    "build",
    "byte_tokenizer",
    "cache_folder",
    "documents",
    "load_tokenizer",
    "open_corpus",
    "split",
    "train_bpe",
]

FORMAT = 1  # of the folder; part of its name, so that folders of another format are not read
END = 256  # id of the end token of every tokenizer; the ids below are the bytes themselves

_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo", "encodings"}
    | {"distutils", "config", "site-packages", "dist-packages"}
)
_STDLIB_LEAST = 4_000_000  # bytes; a stripped Python has less, too little for a vocabulary of 4096
_PACKAGE_FILE_MOST = 1_000_000  # bytes; longer sources are generated tables
_PIECE = 1 << 20  # characters that the BPE takes at a time, so that one huge file fits in memory


# Corpora


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    >>> Document("a.py", "x = 1\\n").name
    'a.py'
    """

    name: str
    text: str


def documents(corpus: str) -> list[Document]:
    """The texts of a corpus, in an order that depends on their names only.

    `corpus` is one of
      stdlib     the .py files of the running interpreter's standard library, without its tests,
                 tables and bundled programs; where that is under 4 MB (stripped Pythons) the
                 installed packages are added, with a warning
      packages   the .py files of the environment's installed packages, at most 1 MB each, equal
                 files once
      synthetic  `SyntheticCode()` in documents of 200 lines
      a path     a file, or every file under a folder; hidden files and folders are skipped

    Files that are empty, binary (a zero byte) or not UTF-8 are skipped. A folder that is called as
    one of the words above is written with a slash: ./stdlib.

    >>> documents("synthetic")[0].name
    'synthetic/000'

    ValueError: an unknown name, a path that does not exist, an unreadable file, or no text.
    """
    if corpus == "stdlib":
        return _stdlib()
    if corpus == "packages":
        return _packages()
    if corpus == "synthetic":
        return _synthetic()
    path = Path(os.path.expanduser(corpus))
    if not corpus or not os.path.exists(path):
        raise ValueError(
            f"the corpus {corpus!r} does not exist: give stdlib, packages, synthetic "
            f"or the path of a file or folder of text"
        )
    root, names = (path, _files(path)) if path.is_dir() else (path.parent, [path.name])
    found = _read(root, names)
    if not found:
        raise ValueError(
            f"the corpus {corpus!r} holds no text: give a file, or a folder of files, in UTF-8 "
            f"that is not empty; hidden files and folders are skipped"
        )
    return found


def _stdlib() -> list[Document]:
    found = _library()
    size = sum(len(d.text) for d in found)
    if size < _STDLIB_LEAST:
        warnings.warn(
            f"the standard library of Python {platform.python_version()} holds only "
            f"{_megabytes(size)} of source: the installed packages are added to the corpus",
            stacklevel=3,
        )
        found += _packages()
    return found


def _library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        Document(f"stdlib/{d.name}", d.text)
        for d in _read(root, _files(root, _SKIPPED, suffix=".py"))
    ]


def _packages() -> list[Document]:
    roots = dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    found: dict[str, Document] = {}  # by text: vendored copies are common
    for root in roots:
        for d in _read(root, _files(root, suffix=".py"), most=_PACKAGE_FILE_MOST):
            found.setdefault(d.text, Document(f"packages/{d.name}", d.text))
    if not found:
        raise ValueError(
            f"the corpus packages is empty: {' and '.join(map(str, roots))} hold no .py files; "
            f"give stdlib, synthetic or a path"
        )
    return list(found.values())


def _synthetic(lines: int = 200) -> list[Document]:
    text, size = SyntheticCode().text(), lines * _LINE
    return [
        Document(f"synthetic/{i:03}", text[start : start + size])
        for i, start in enumerate(range(0, len(text), size))
    ]


def _files(root: Path, skipped: frozenset[str] = frozenset(), suffix: str = "") -> list[str]:
    """Names of the files under `root`, sorted; hidden ones and skipped folders are left out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        here = Path(folder).relative_to(root)
        names += [
            (here / f).as_posix() for f in files if f.endswith(suffix) and not f.startswith(".")
        ]
    return sorted(names)


def _read(root: Path, names: Iterable[str], most: float = math.inf) -> list[Document]:
    found = []
    for name in names:
        path = root / name
        if not path.is_file():  # a dangling link, a socket
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path} can't be read ({error.strerror}): allow it or move it away"
            ) from None
        if not 0 < len(data) <= most or b"\0" in data:
            continue
        try:
            found.append(Document(name, data.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, validation): about 5 percent of the documents validate, chosen by their content.

    A document validates when sha256(text) mod 20 is 0. So equal texts fall on one side, where only
    the first is kept, and the side of a file does not change when others are added or renamed.

    Where this leaves less than 1 or more than 20 percent of the text to validation (one file, few
    files, one huge file), the documents are read in order instead and cut once, after the last line
    that ends between 90 and 95 percent (in mid-line, where none does). Either way no part of a
    document is on both sides.

    >>> train, validation = split([Document("a", "one\\n" * 100)])
    >>> len(train[0].text), len(validation[0].text)
    (380, 20)

    ValueError: fewer than two characters of text.
    """
    unique: dict[str, Document] = {}
    for d in documents:
        unique.setdefault(d.text, d)
    train: list[Document] = []
    validation: list[Document] = []
    for d in unique.values():
        (train if int.from_bytes(_sha256(d.text)) % 20 else validation).append(d)
    total = sum(map(len, unique))
    if total < 2:
        raise ValueError(
            f"the corpus holds {total} characters: give at least two, one to train on and one to "
            f"validate on"
        )
    if 0.01 * total <= sum(len(d.text) for d in validation) <= 0.2 * total:
        return train, validation
    return _cut(list(unique.values()), total)


def _cut(documents: Sequence[Document], total: int) -> tuple[list[Document], list[Document]]:
    i, room = 0, max(1, total * 95 // 100)  # room: characters before the cut that are left
    while len(documents[i].text) <= room:
        room -= len(documents[i].text)
        i += 1
    if room == 0:
        return list(documents[:i]), list(documents[i:])
    name, text = documents[i].name, documents[i].text
    at = text.rfind("\n", max(0, room - total // 20), room) + 1 or room
    head, tail = Document(f"{name}[:{at}]", text[:at]), Document(f"{name}[{at}:]", text[at:])
    return [*documents[:i], head], [tail, *documents[i + 1 :]]


# A corpus of known entropy

_TEMPLATE = "def {}{}{}{}({}, {}): return {} {} {}\n"
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_OPERATORS = "+-*/%&|^"
_CHOICES = (
    *(len(_CONSONANTS), len(_VOWELS), len(_CONSONANTS), len(_VOWELS)),  # the function's name
    *(len(_LETTERS), len(_LETTERS) - 1),  # two different arguments
    *(len(_OPERATORS), 2),  # the operator, and which argument comes first
)
_LINE = len(_TEMPLATE.format(*"baba", *"ab", *"a+b"))


@dataclass(frozen=True)
class SyntheticCode:
    """Python text of exactly known entropy, to test a trainer on.

    Each statement is one line of 29 bytes such as

        def guda(a, b): return b - a

    The name (consonant, vowel, consonant, vowel), the two different arguments, the operator and the
    order of the arguments are drawn uniformly and independently, all from `seed`. The arguments
    after `return` can be predicted only by looking back at the signature. No two adjacent bytes are
    equal, line ends included: under the byte tokenizer a prediction that copies its input is never
    right.

    `floor` is the entropy in nats per byte. Every line costs the same, so a model that has learnt
    everything pays exactly this on any number of lines that it has not seen:

        ln(20*5*20*5 * 26*25 * 8*2) / 29

    In shards the end token after each document of 200 lines changes the mean per token by less than
    0.002. A window that starts in mid-line has lost what came before, which adds at most
    (ln 29 + ln(26*25)) / T to the mean over its T targets.

    >>> SyntheticCode(statements=2).text()
    'def suje(y, u): return y / u\\ndef gedi(v, b): return v % b\\n'
    >>> round(SyntheticCode().floor, 4)
    0.6365

    ValueError: a negative seed, or no statements.
    """

    seed: int = 0
    statements: int = 20000

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: give an integer from 0 to 2**64 - 1")
        if self.statements < 1:
            raise ValueError(f"statements is {self.statements}: give at least 1")

    def text(self) -> str:
        """The text; the same seed gives the same bytes, and fewer statements a prefix of more.

        >>> len(SyntheticCode(seed=3, statements=10).text())
        290
        """
        # The raw stream of a bit generator is fixed for ever; those of the distributions may change
        # between NumPy versions. The remainder is uniform to one part in 2**59. Batches draw with
        # the key (seed, step): no step is this large, so that the two streams are unrelated.
        key = np.array([self.seed, 2**64 - 1], np.uint64)
        raw = np.random.Philox(key=key).random_raw(self.statements * len(_CHOICES))
        draws = raw.reshape(self.statements, -1) % np.array(_CHOICES, np.uint64)
        lines = []
        for c0, v0, c1, v1, first, second, operator, swap in draws.tolist():
            a, b = _LETTERS[first], _LETTERS[second + (second >= first)]
            left, right = (b, a) if swap else (a, b)
            name = (_CONSONANTS[c0], _VOWELS[v0], _CONSONANTS[c1], _VOWELS[v1])
            lines.append(_TEMPLATE.format(*name, a, b, left, _OPERATORS[operator], right))
        return "".join(lines)

    @property
    def floor(self) -> float:
        """Entropy in nats per byte: sum of the logarithms of the choices over bytes per line.

        >>> SyntheticCode(seed=1).floor == SyntheticCode(seed=2).floor
        True
        """
        return sum(map(math.log, _CHOICES)) / _LINE


# Tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer: ids 0 to 255 are the bytes, 256 ends a document, merges follow.

    `merges` are the pairs of byte strings that BPE joins, in order of priority; without merges this
    is the byte tokenizer. `vocab` V counts all ids; ids beyond the last merge are unused, stand for
    no text and are never produced. Before merging, text is cut into words by the pattern of GPT-2,
    and where it is longer than 2**20 characters into pieces at line boundaries.

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
        if self.vocab < len(known) + 1:
            raise ValueError(
                f"vocab is {self.vocab}: 256 bytes, {len(known) - 256} merged tokens and the end "
                f"token need {len(known) + 1}"
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
        """The text of some ids. The end token and unused ids are dropped.

        Bytes that are not UTF-8, such as half a character, become U+FFFD. A stream is decoded by
        joining `tokens` and decoding the bytes incrementally.

        >>> byte_tokenizer().decode([104, 195, 169, 256])
        'hé'

        ValueError: an id outside the vocabulary.
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

        >>> with tempfile.TemporaryDirectory() as folder:
        ...     byte_tokenizer().save(f"{folder}/t.json")
        ...     load_tokenizer(f"{folder}/t.json") == byte_tokenizer()
        True
        """
        _write(Path(path), json.dumps(self._tree(), ensure_ascii=False, indent=1) + "\n")

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
    _check_kind("bpe", vocab)
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
    learnt = json.loads(learner.to_str())["model"]["merges"]
    return Tokenizer(vocab, tuple((_unspell(left), _unspell(right)) for left, right in learnt))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; anything else is refused.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train_bpe(["a b a b"], 260).save(f"{folder}/t.json")
    ...     load_tokenizer(f"{folder}/t.json").vocab
    260

    ValueError: no such file, not JSON, or not exactly what `save` writes.
    """
    try:
        tree = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} can't be read as a tokenizer ({error}): restore the file or build it again"
        ) from None
    try:
        model = tree["model"]
        merges = tuple((_unspell(left), _unspell(right)) for left, right in model["merges"])
        tokenizer = Tokenizer(len(model["vocab"]), merges)
        same = json.dumps(tokenizer._tree(), sort_keys=True) == json.dumps(tree, sort_keys=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a tokenizer of this library ({type(error).__name__}: {error}): "
            f"restore the file or build it again"
        ) from None
    if not same:
        raise ValueError(
            f"{path} differs from what its own merges give: restore the file or build it again"
        )
    return tokenizer


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


def _check_kind(kind: str, vocab: int) -> None:
    if kind == "byte":
        if vocab != 257:
            raise ValueError(
                f"the byte tokenizer has 257 tokens, not {vocab}: set --model.vocab 257"
            )
    elif kind == "bpe":
        if vocab < 257:
            raise ValueError(
                f"a byte-level BPE of {vocab} tokens is too small: set --model.vocab to 257 or more"
            )
    else:
        raise ValueError(f"the tokenizer is {kind!r}: choose bpe or byte")


# Shards


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus on disk: what `build` and `open_corpus` return.

    `train` and `validation` are flat files of `dtype`; `*_tokens` counts their ids, end tokens
    included, `*_bytes` the bytes of their text. `sha256` is of the split documents, `python` the
    version that built the folder: losses of corpora whose sha256 differ can't be compared.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = build("synthetic", "byte", 257, cache=Path(folder))
    >>> corpus.train.name, corpus.train_bytes + corpus.validation_bytes
    ('train.bin', 580000)
    """

    folder: Path
    train: Path
    validation: Path
    dtype: np.dtype
    vocab: int
    train_tokens: int
    train_bytes: int
    validation_tokens: int
    validation_bytes: int
    sha256: str
    python: str
    tokenizer: Tokenizer


def cache_folder() -> Path:
    """Where shards are kept: $MHCJAX_CACHE, else the user's cache folder, else a temporary one.

    The user's is $XDG_CACHE_HOME/mhcjax, ~/Library/Caches/mhcjax on macOS, else ~/.cache/mhcjax.
    Where that can't be written the temporary one serves, with a warning.

    >>> cache_folder().is_dir()
    True

    ValueError: $MHCJAX_CACHE can't be written.
    """
    given = os.environ.get("MHCJAX_CACHE")
    if given:
        folder = Path(os.path.expanduser(given)).absolute()
        if not _writable(folder):
            raise ValueError(f"MHCJAX_CACHE is {given!r}, which can't be written: name another")
        return folder
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        base = Path(xdg)
    else:
        base = Path(
            os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
        )
    folder = base / "mhcjax"  # not absolute where nobody's home is known
    if folder.is_absolute() and _writable(folder):
        return folder
    user = getattr(os, "getuid", lambda: "user")()
    temporary = Path(tempfile.gettempdir()) / f"mhcjax-{user}"
    if not _writable(temporary, mode=0o700):
        temporary = Path(tempfile.mkdtemp(prefix="mhcjax-"))
    warnings.warn(
        f"{folder} can't be written: tokens are kept in {temporary}; set MHCJAX_CACHE to choose",
        stacklevel=2,
    )
    return temporary


def build(
    corpus: str,
    tokenizer: str,
    vocab: int,
    *,
    cache: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """The shards of a corpus, from the cache or made now.

    `corpus` as in `documents`, `tokenizer` "bpe" (trained on the train split alone) or "byte",
    `vocab` the model's; `cache` a folder (None: `cache_folder()`); `say` receives progress lines.

    The folder is named by the sha256 of the split documents, the tokenizer and the format, and
    appears complete or not at all; of several builders at once the first wins and all return the
    same. A corpus too small to fill the vocabulary leaves ids unused, counted in meta.json.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = build("synthetic", "bpe", 300, cache=folder)
    ...     ids = np.fromfile(corpus.train, corpus.dtype)
    >>> len(ids) == corpus.train_tokens, int(ids.max()) < 300
    (True, True)

    ValueError: an unknown or empty corpus, a vocabulary that the tokenizer can't have, a cache that
    can't be written, or a damaged folder in it.
    """
    say = say or (lambda line: None)
    _check_kind(tokenizer, vocab)
    folder = cache_folder() if cache is None else Path(os.path.expanduser(cache)).absolute()
    if not _writable(folder):
        raise ValueError(f"the cache {str(folder)!r} can't be written: name another folder")
    say(f"reading the corpus {corpus}")
    found = documents(corpus)
    train, validation = split(found)
    sha256 = hashlib.sha256()
    for part in (train, validation):
        sha256.update(b"".join(_sha256(d.text) for d in part) + b"|")
    key = hashlib.sha256(f"{sha256.hexdigest()} {tokenizer} {vocab} {FORMAT}".encode()).hexdigest()
    target = folder / f"{tokenizer}{vocab}-{key[:16]}"
    if target.exists():
        say(f"tokens found in {target}")
        return open_corpus(target)

    size = _megabytes(sum(_bytes(d) for d in found))
    # Dots hide it from a listing; a name of its own keeps concurrent builders apart.
    work = folder / f".{target.name}-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        if tokenizer == "bpe":
            say(f"training a BPE of {vocab} tokens on {_megabytes(sum(map(_bytes, train)))}")
            coder = train_bpe((d.text for d in train), vocab)
        else:
            coder = byte_tokenizer()
        coder.save(work / "tokenizer.json")
        say(f"encoding {len(found)} documents, {size}")
        dtype = np.dtype("<u2" if vocab <= 65536 else "<u4")
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer,
            "tokenizer_sha256": _file_sha256(work / "tokenizer.json"),
            "vocab": vocab,
            "unused": coder.unused,
            "dtype": dtype.str,
            "sha256": sha256.hexdigest(),
            "python": platform.python_version(),
            "train": _write_shard(work / "train.bin", train, coder, dtype),
            "validation": _write_shard(work / "validation.bin", validation, coder, dtype),
        }
        meta["meta_sha256"] = _seal(meta)
        _write(work / "meta.json", json.dumps(meta, indent=1) + "\n")
        try:
            os.rename(work, target)
        except OSError:
            if not target.exists():
                raise
            say(f"tokens built meanwhile by another process in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    made = open_corpus(target)
    say(
        f"{made.train_tokens:,} tokens to train on, {made.validation_tokens:,} to validate on, "
        f"in {target}"
    )
    return made


def open_corpus(folder: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """The corpus in a folder that `build` made.

    Always checked: meta.json and the tokenizer by their sha256, the shards by their sizes. With
    `verify` every id and the sha256 of the shards too, which reads them whole.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = build("synthetic", "byte", 257, cache=folder)
    ...     open_corpus(made.folder, verify=True) == made
    True

    ValueError: a file that is missing or does not hold what meta.json says, by name.
    """
    folder = Path(folder)
    fix = f"delete the folder {folder}, it is rebuilt"
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}): {fix}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: {fix}")
    if meta.pop("meta_sha256", None) != _seal(meta):
        raise ValueError(f"{path} was changed since it was built: {fix}")
    dtype, vocab = np.dtype(meta["dtype"]), meta["vocab"]
    for name in ("train", "validation"):
        _check_shard(folder / f"{name}.bin", meta[name], dtype, vocab, fix, verify)

    path = folder / "tokenizer.json"
    if not path.is_file() or _file_sha256(path) != meta["tokenizer_sha256"]:
        raise ValueError(f"{path} is missing or was changed since it was built: {fix}")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab != vocab:
        raise ValueError(f"{path} has {tokenizer.vocab} tokens where meta.json says {vocab}: {fix}")
    return Corpus(
        folder=folder,
        train=folder / "train.bin",
        validation=folder / "validation.bin",
        dtype=dtype,
        vocab=vocab,
        train_tokens=meta["train"]["tokens"],
        train_bytes=meta["train"]["bytes"],
        validation_tokens=meta["validation"]["tokens"],
        validation_bytes=meta["validation"]["bytes"],
        sha256=meta["sha256"],
        python=meta["python"],
        tokenizer=tokenizer,
    )


def _seal(meta: dict[str, Any]) -> str:
    return _sha256(json.dumps(meta, sort_keys=True)).hex()


def _check_shard(
    path: Path, said: dict[str, Any], dtype: np.dtype, vocab: int, fix: str, verify: bool
) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size < 0:
        raise ValueError(f"{path} is missing: {fix}")
    if size != said["tokens"] * dtype.itemsize:
        raise ValueError(
            f"{path} holds {size} bytes where meta.json says {said['tokens']} tokens of "
            f"{dtype.itemsize} bytes: {fix}"
        )
    if verify and size:
        largest = int(np.memmap(path, dtype, "r").max())
        if largest >= vocab:
            raise ValueError(f"{path} holds the id {largest}, outside {vocab} tokens: {fix}")
        if _file_sha256(path) != said["sha256"]:
            raise ValueError(f"{path} was changed since it was built (sha256 differs): {fix}")


def _write_shard(
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype
) -> dict[str, Any]:
    count = {"documents": 0, "tokens": 0, "bytes": 0}
    with open(path, "wb") as file:
        for d in documents:
            ids = np.append(tokenizer.encode(d.text), tokenizer.end)
            if ids.max() >= tokenizer.vocab:
                raise ValueError(
                    f"{d.name} encodes to the id {ids.max()}, outside {tokenizer.vocab} tokens: "
                    f"report a bug of the tokenizer"
                )
            file.write(ids.astype(dtype).tobytes())
            count["documents"] += 1
            count["tokens"] += len(ids)
            count["bytes"] += _bytes(d)
    return {**count, "sha256": _file_sha256(path)}


# Files and sizes


def _write(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that no reader sees half of it."""
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        work.write_text(text, "utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _writable(folder: Path, mode: int = 0o777) -> bool:
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
