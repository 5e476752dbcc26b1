"""Token shards: a corpus, split and encoded, in a cache on disk.

    build("stdlib", "bpe", 4096) -> Corpus: train.bin, validation.bin, tokenizer.json, meta.json

A shard is a flat little-endian array of ids in which every document is followed by the end token.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhcjax.corpora import Document, documents, split
from mhcjax.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

__all__ = ["Corpus", "build", "cache_folder", "open_corpus"]

FORMAT = 1  # of the folder; part of its name, so that folders of another format are not read


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus on disk.

    `train` and `validation` are flat files of `dtype`; `*_tokens` counts their ids, end tokens
    included, `*_bytes` the bytes of their text. `sha256` is of the split documents: losses of
    corpora where it differs can't be compared. `python` is the version that built the folder.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = build("synthetic", "byte", 257, cache=folder)
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
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    folder = Path(base) / "mhcjax"  # not absolute where nobody's home is known
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

    `corpus` as in `corpora.documents`, `tokenizer` "bpe" (trained on the train split alone) or
    "byte", `vocab` the model's; `cache` a folder (None: `cache_folder()`); `say` receives progress
    lines.

    The folder is named by the sha256 of the split documents, the tokenizer and the format, and
    appears complete or not at all; of several builders at once the first wins and all return the
    same.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = build("synthetic", "bpe", 300, cache=folder)
    ...     ids = np.fromfile(corpus.train, corpus.dtype)
    >>> len(ids) == corpus.train_tokens, int(ids.max()) < 300
    (True, True)

    ValueError: an unknown or empty corpus, a vocabulary that the tokenizer can't have, a cache that
    can't be written, or a damaged folder in it.
    """
    say = say or (lambda line: None)
    if tokenizer not in ("bpe", "byte"):
        raise ValueError(f"the tokenizer is {tokenizer!r}: choose bpe or byte")
    if tokenizer == "byte" and vocab != 257:
        raise ValueError(f"the byte tokenizer has 257 tokens, not {vocab}: set --model.vocab 257")
    Tokenizer(vocab)  # refuses one too small before the work
    folder = cache_folder() if cache is None else Path(os.path.expanduser(cache)).absolute()
    if not _writable(folder):
        raise ValueError(f"the cache {str(folder)!r} can't be written: name another folder")
    say(f"reading the corpus {corpus}")
    found = documents(corpus)
    train, validation = split(found)
    sha256 = hashlib.sha256()
    for part in (train, validation):
        sha256.update(b"".join(_sha256(d.text) for d in part) + b"|")
    key = _sha256(f"{sha256.hexdigest()} {tokenizer} {vocab} {FORMAT}").hex()
    target = folder / f"{tokenizer}{vocab}-{key[:16]}"
    if target.exists():
        say(f"tokens found in {target}")
        return open_corpus(target)

    # Dots hide it from a listing; a name of its own keeps concurrent builders apart.
    work = folder / f".{target.name}-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        if tokenizer == "bpe":
            say(f"training a BPE of {vocab} tokens on {_megabytes(train)}")
            coder = train_bpe((d.text for d in train), vocab)
        else:
            coder = byte_tokenizer()
        coder.save(work / "tokenizer.json")
        say(f"encoding {len(found)} documents, {_megabytes(found)}")
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
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
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
        tokenizer=load_tokenizer(path),
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


def _megabytes(documents: Iterable[Document]) -> str:
    return f"{sum(map(_bytes, documents)) / 1e6:.1f} MB"
