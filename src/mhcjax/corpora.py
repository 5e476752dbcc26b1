"""Text: the documents of a corpus, their split for validation, a corpus of known entropy.

train, validation = split(documents("stdlib"))
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Document", "SyntheticCode", "documents", "split"]

_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo", "encodings"}
    | {"distutils", "config", "site-packages", "dist-packages"}
)
_STDLIB_LEAST = 4_000_000  # characters; a stripped Python has too few for a vocabulary of 4096
_PACKAGE_FILE_MOST = 1_000_000  # bytes; longer sources are generated tables


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
      a path     a file, or every file under a folder (a folder named stdlib is ./stdlib); hidden
                 files and folders are skipped

    Files that are empty, binary (a zero byte) or not UTF-8 are skipped.

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
    found = _read(path, _files(path)) if path.is_dir() else _read(path.parent, [path.name])
    if not found:
        raise ValueError(
            f"the corpus {corpus!r} holds no text: give a file, or a folder of files, in UTF-8 "
            f"that is not empty; hidden files and folders are skipped"
        )
    return found


def _stdlib() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _read(root, _files(root, _SKIPPED, suffix=".py"), "stdlib/")
    size = sum(len(d.text) for d in found)
    if size < _STDLIB_LEAST:
        warnings.warn(
            f"the standard library of Python {platform.python_version()} holds only "
            f"{size / 1e6:.1f} MB of source: the installed packages are added to the corpus",
            stacklevel=3,
        )
        found += _packages()
    return found


def _packages() -> list[Document]:
    roots = dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    found: dict[str, Document] = {}  # by text: vendored copies are common
    for root in roots:
        for d in _read(root, _files(root, suffix=".py"), "packages/", _PACKAGE_FILE_MOST):
            found.setdefault(d.text, d)
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


def _read(
    root: Path, names: Iterable[str], prefix: str = "", most: float = math.inf
) -> list[Document]:
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
            found.append(Document(prefix + name, data.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, validation): about 5 percent of the documents validate, chosen by their content.

    A document validates when sha256(text) mod 20 is 0, so that its side does not change when others
    are added or files are renamed. Of equal texts the first is kept.

    Where this leaves less than 1 or more than 20 percent of the text to validation (few files, one
    huge file), the documents are read in order and cut once, after the last line that ends between
    90 and 95 percent (in mid-line, where none does).

    >>> train, validation = split([Document("a", "one\\n" * 100)])
    >>> len(train[0].text), len(validation[0].text)
    (380, 20)

    ValueError: fewer than two characters of text.
    """
    unique: dict[str, Document] = {}
    for d in documents:
        unique.setdefault(d.text, d)
    total = sum(map(len, unique))
    if total < 2:
        raise ValueError(
            f"the corpus holds {total} characters: give at least two, one to train on and one to "
            f"validate on"
        )
    train: list[Document] = []
    validation: list[Document] = []
    for text, d in unique.items():
        chosen = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()) % 20 == 0
        (validation if chosen else train).append(d)
    if 0.01 * total <= sum(len(d.text) for d in validation) <= 0.2 * total:
        return train, validation
    return _cut(list(unique.values()), total)


def _cut(documents: list[Document], total: int) -> tuple[list[Document], list[Document]]:
    i, room = 0, max(1, total * 95 // 100)  # room: characters before the cut that are left
    while len(documents[i].text) <= room:
        room -= len(documents[i].text)
        i += 1
    if room == 0:
        return documents[:i], documents[i:]
    name, text = documents[i].name, documents[i].text
    at = text.rfind("\n", max(0, room - total // 20), room) + 1 or room
    head, tail = Document(f"{name}[:{at}]", text[:at]), Document(f"{name}[{at}:]", text[at:])
    return [*documents[:i], head], [tail, *documents[i + 1 :]]


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
    order of the arguments are drawn uniformly and independently. The arguments after `return` can
    be predicted only by looking back at the signature. No two adjacent bytes are equal, line ends
    included: under the byte tokenizer a prediction that copies its input is never right.

    `floor` is the entropy in nats per byte, what a model that has learnt everything pays on any
    number of unseen lines, as each costs the same:

        ln(20*5*20*5 * 26*25 * 8*2) / 29

    In shards the end token after each document of 200 lines changes the mean per token by less than
    0.002. A window that starts in mid-line has lost what came before, which adds at most
    (ln 29 + ln(26*25)) / T to the mean over its T targets.

    >>> SyntheticCode(statements=2).text()
    'def suje(y, u): return y / u\\ndef gedi(v, b): return v % b\\n'
    >>> round(SyntheticCode().floor, 4)
    0.6365

    ValueError: a seed outside 0 to 2**64 - 1, or no statements.
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
