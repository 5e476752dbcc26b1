"""Shards, their cache and where it is."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mhcjax import tokens
from mhcjax.corpora import documents, split
from mhcjax.tokenizer import Tokenizer, train_bpe
from mhcjax.tokens import Corpus, build, cache_folder, open_corpus

TEXT = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))  # naïve ☃ 🙂\n"


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def folder_of(path: Path, files: int = 60) -> Path:
    path.mkdir()
    for i in range(files):
        (path / f"{i:03}.py").write_text(TEXT + f"x{i} = {i}\n" * (20 + i % 7))
    return path


def read(path: Path, corpus: Corpus) -> np.ndarray:
    return np.fromfile(path, corpus.dtype)


@pytest.mark.parametrize(("kind", "vocab"), [("byte", 257), ("bpe", 300), ("bpe", 70_000)])
def test_shards_hold_the_documents_and_their_ends(tmp_path, kind, vocab):
    folder = folder_of(tmp_path / "text")
    corpus = build(str(folder), kind, vocab, cache=tmp_path / "cache")
    assert corpus.dtype == np.dtype("<u2" if vocab <= 65536 else "<u4")
    train, validation = split(documents(str(folder)))
    for shard, part, count, size in (
        (corpus.train, train, corpus.train_tokens, corpus.train_bytes),
        (corpus.validation, validation, corpus.validation_tokens, corpus.validation_bytes),
    ):
        ids = read(shard, corpus)
        ends = np.flatnonzero(ids == corpus.tokenizer.end)
        assert len(ends) == len(part) and ends[-1] == len(ids) - 1
        texts = [corpus.tokenizer.decode(x) for x in np.split(ids, ends + 1)[:-1]]
        assert texts == [d.text for d in part]
        assert len(ids) == count and ids.max() < vocab
        assert size == corpus.tokenizer.token_bytes[ids].sum()
        assert size == sum(len(d.text.encode()) for d in part)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["unused"] == corpus.tokenizer.unused
    assert (meta["unused"] > 0) == (vocab == 70_000)
    assert corpus.python == ".".join(map(str, sys.version_info[:3]))


def test_bpe_is_trained_on_the_train_split_only(tmp_path):
    folder = folder_of(tmp_path / "text")
    train, validation = split(documents(str(folder)))
    corpus = build(str(folder), "bpe", 400, cache=tmp_path)
    assert corpus.tokenizer == train_bpe((d.text for d in train), 400)
    assert corpus.tokenizer != train_bpe((d.text for d in [*train, *validation * 30]), 400)


def test_the_cache_is_found_by_content(tmp_path):
    folder, lines = folder_of(tmp_path / "text"), []
    cache = tmp_path / "cache"
    first = build(str(folder), "byte", 257, cache=cache, say=lines.append)
    assert [line.split()[0] for line in lines] == ["reading", "encoding", f"{first.train_tokens:,}"]
    before = os.stat(first.train).st_mtime_ns
    lines.clear()
    again = build(str(folder), "byte", 257, cache=cache, say=lines.append)
    assert again == first and lines[-1] == f"tokens found in {first.folder}"
    assert os.stat(first.train).st_mtime_ns == before
    moved = folder.rename(tmp_path / "moved")
    assert build(str(moved), "byte", 257, cache=cache) == first
    others = [
        build(str(moved), "bpe", 257, cache=cache),
        build(str(moved), "bpe", 300, cache=cache, say=lines.append),
    ]
    assert "training a BPE of 300 tokens" in "".join(lines)
    (moved / "000.py").write_text("changed\n")
    others.append(build(str(moved), "byte", 257, cache=cache))
    assert len({first.folder, *(c.folder for c in others)}) == 4
    assert others[0].sha256 == first.sha256 != others[2].sha256
    assert not [name for name in os.listdir(cache) if name.startswith(".")]


def test_vocabularies_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"set --model\.vocab 257"):
        build("synthetic", "byte", 4096, cache=tmp_path)
    with pytest.raises(ValueError, match=r"set --model\.vocab to 257 or more"):
        build("synthetic", "bpe", 256, cache=tmp_path)
    with pytest.raises(ValueError, match="choose bpe or byte"):
        build("synthetic", "words", 300, cache=tmp_path)
    assert not os.listdir(tmp_path)


def damage(path: Path, at: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(bytes(data))


def test_damaged_folders_are_refused(tmp_path):
    corpus = build("synthetic", "bpe", 300, cache=tmp_path)
    folder = corpus.folder
    assert open_corpus(folder, verify=True) == corpus

    def refused(name: str, why: str, verify: bool = False) -> None:
        with pytest.raises(ValueError, match=why) as error:
            open_corpus(folder, verify=verify)
        assert str(folder / name) in one_line(error)
        assert f"delete the folder {folder}, it is rebuilt" in one_line(error)

    for name in ("train.bin", "validation.bin"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
        refused(name, "holds .* bytes where meta.json says")
        with pytest.raises(ValueError, match="it is rebuilt"):
            build("synthetic", "bpe", 300, cache=tmp_path)  # a damaged cache is never used
        (folder / name).write_bytes(data + b"\0\0")
        refused(name, "holds .* bytes where meta.json says")
        (folder / name).unlink()
        refused(name, "is missing")
        (folder / name).write_bytes(data)
        damage(folder / name, 1000, data[1000] ^ 1)  # still an id of the vocabulary
        refused(name, "sha256 differs", verify=True)
        damage(folder / name, 1001, 0xFF)
        refused(name, "holds the id .*, outside 300 tokens", verify=True)
        (folder / name).write_bytes(data)
    for name in ("meta.json", "tokenizer.json"):
        data = (folder / name).read_bytes()
        for at in (data.index(b"300") if b"300" in data else 50, len(data) // 2):
            damage(folder / name, at, ord("7") if data[at] != ord("7") else ord("8"))
            refused(name, "changed since|can't be read|not of format")
            (folder / name).write_bytes(data)
        (folder / name).write_bytes(data[: len(data) // 2])
        refused(name, "changed since|can't be read|is missing")
        (folder / name).unlink()
        refused(name, "changed since|can't be read|is missing")
        (folder / name).write_bytes(data)
    (folder / "meta.json").write_text("[]")
    refused("meta.json", "not of format")
    (folder / "meta.json").write_text(json.dumps({"format": tokens.FORMAT + 1}))
    refused("meta.json", "not of format")


def test_counts_in_meta_can_not_be_edited(tmp_path):
    corpus = build("synthetic", "byte", 257, cache=tmp_path)
    path = corpus.folder / "meta.json"
    meta = json.loads(path.read_text())
    meta["validation"]["bytes"] += 1  # would change bits per byte and nothing else
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json was changed"):
        open_corpus(corpus.folder)


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: np.array([self.vocab], np.int32))
    with pytest.raises(ValueError, match=r"synthetic/000 encodes to the id 257, outside 257"):
        build("synthetic", "byte", 257, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_builders_at_once_agree(tmp_path):
    folder, cache = folder_of(tmp_path / "text"), tmp_path / "cache"
    start, made = threading.Barrier(4), []

    def work():
        start.wait()
        made.append(build(str(folder), "bpe", 300, cache=cache))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and all(corpus == made[0] for corpus in made)
    assert os.listdir(cache) == [made[0].folder.name]
    open_corpus(made[0].folder, verify=True)


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path, monkeypatch):
    rename, lines = os.rename, []

    def late(source, target):
        rename(source, target)  # the winner ...
        Path(source).mkdir()
        rename(source, target)  # ... and we, a moment later

    monkeypatch.setattr(tokens.os, "rename", late)
    corpus = build("synthetic", "byte", 257, cache=tmp_path, say=lines.append)
    assert any("built meanwhile" in line for line in lines)
    assert os.listdir(tmp_path) == [corpus.folder.name]


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            build("synthetic", "byte", 257, cache=tmp_path)
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(tokens.os, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            build("synthetic", "byte", 257, cache=tmp_path)
    assert os.listdir(tmp_path) == []
    build("synthetic", "byte", 257, cache=tmp_path)


# the cache folder


def test_cache_folder_order(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(tokens.sys, "platform", "linux")
    monkeypatch.setattr(tokens.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MHCJAX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("MHCJAX_CACHE", str(blocked / "sub"))
    with pytest.raises(ValueError, match=r"MHCJAX_CACHE is .*sub.* name another"):
        cache_folder()
    monkeypatch.delenv("MHCJAX_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "mhcjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mhcjax"
    monkeypatch.setattr(tokens.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "home" / "Library" / "Caches" / "mhcjax"
    monkeypatch.setenv("HOME", str(blocked))
    with pytest.warns(UserWarning, match="set MHCJAX_CACHE"):
        assert cache_folder().parent == tmp_path / "tmp"
    with pytest.raises(ValueError, match="can't be written: name another folder"):
        build("synthetic", "byte", 257, cache=blocked)


# the real thing


def test_stdlib_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("MHCJAX_CACHE", str(tmp_path))
    start = time.perf_counter()
    corpus = build("stdlib", "bpe", 4096, say=print)
    print(f"built in {time.perf_counter() - start:.1f} s")
    assert corpus.folder.parent == tmp_path
    assert corpus.tokenizer.unused == 0 and corpus.dtype == np.dtype("<u2")
    total = corpus.train_bytes + corpus.validation_bytes
    assert total >= 4_000_000
    assert 0.01 <= corpus.validation_bytes / total <= 0.2
    assert 3 < corpus.validation_bytes / corpus.validation_tokens < 5  # bytes per token
    ids = read(corpus.validation, corpus)
    assert corpus.tokenizer.token_bytes[ids].sum() == corpus.validation_bytes
    assert build("stdlib", "bpe", 4096) == corpus
