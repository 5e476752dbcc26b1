"""Tokenizers: exact round trips, ids, training, files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcjax import tokenizer
from mhcjax.corpora import SyntheticCode
from mhcjax.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

TEXT = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))  # naïve ☃ 🙂\n"
BPE = train_bpe([TEXT * 3], 330)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@settings(deadline=None, max_examples=200)
@given(UNICODE)
def test_round_trip_is_exact_for_any_text(text):
    for coder in (byte_tokenizer(), BPE):
        ids = coder.encode(text)
        assert coder.decode(ids) == text
        assert ids.dtype == np.int32 and (ids < coder.vocab).all()
        assert coder.end not in ids
        assert coder.token_bytes[ids].sum() == len(text.encode())


@settings(deadline=None)
@given(st.lists(st.sampled_from([*BPE._tree()["model"]["vocab"], " "])))
def test_text_that_spells_token_names_is_only_text(names):
    text = "".join(names)
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.end not in BPE.encode(text)


def test_the_end_token_can_not_be_spelt():
    for text in ("<end of document>", "<|endoftext|>", "<unused 300>", "a<end of document>b"):
        greedy = train_bpe([text * 50], 400)  # has merged whatever it could of it
        ids = greedy.encode(text * 3)
        assert greedy.end not in ids and greedy.decode(ids) == text * 3
        assert greedy.decode([*ids, greedy.end]) == text * 3


def test_bpe_ids_are_bytes_then_end_then_merges():
    assert BPE.tokens[:256] == tuple(bytes([b]) for b in range(256))
    assert BPE.tokens[BPE.end] == b"" and BPE.token_bytes[BPE.end] == 0
    assert BPE.token_bytes.tolist() == [len(t) for t in BPE.tokens]
    assert len(BPE.tokens) == len(BPE.token_bytes) == BPE.vocab
    assert len(BPE.encode(TEXT)) < 0.7 * len(byte_tokenizer().encode(TEXT))
    with pytest.raises(ValueError, match="read-only"):
        BPE.token_bytes[0] = 7


def test_hugging_face_reads_the_file_and_gives_the_same_ids(tmp_path):
    import tokenizers

    BPE.save(tmp_path / "t.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert other.get_vocab_size() == BPE.vocab
    assert other.encode(TEXT).ids == BPE.encode(TEXT).tolist()
    assert other.decode(other.encode(TEXT).ids) == TEXT


def test_a_tiny_corpus_leaves_ids_unused():
    tiny = train_bpe(["ab ab"], 4096)
    assert tiny.vocab == 4096 and 3800 < tiny.unused < 4096 - 257
    assert tiny.encode("ab ab").max() < 4096 - tiny.unused
    assert tiny.decode([4095]) == "" and tiny.token_bytes[4095] == 0
    assert train_bpe([], 257) == byte_tokenizer()


def test_two_ways_to_the_same_token_share_an_id():
    merges = ((b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc"))
    tokenizer = Tokenizer(261, merges)
    assert tokenizer.tokens[257:] == (b"ab", b"bc", b"abc", b"")
    assert tokenizer.unused == 1
    assert tokenizer.decode(tokenizer.encode("abc bca")) == "abc bca"


def test_bpe_training_is_the_same_in_another_process():
    script = (
        "from mhcjax.corpora import SyntheticCode; from mhcjax.tokenizer import train_bpe;"
        "print(train_bpe([SyntheticCode().text()], 600).merges)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    }
    assert len(seen) == 1
    assert train_bpe([SyntheticCode(seed=1).text()], 600) != train_bpe(
        [SyntheticCode().text()], 600
    )


def test_long_text_is_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(tokenizer, "_PIECE", 50)
    text = TEXT * 40 + "x" * 300 + "é" * 120
    pieces = list(tokenizer._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) == 50 and len(pieces) > 40
    assert BPE.decode(BPE.encode(text)) == text
    assert train_bpe([text], 300).vocab == 300


def test_decoding_half_a_character_and_wrong_ids():
    t = byte_tokenizer()
    assert t.decode([226, 152]) == "\ufffd"
    assert t.decode([]) == "" and t.decode(np.zeros((0,), np.float32)) == ""
    assert t.decode(np.array([[104], [105]], np.uint16)) == "hi"
    for bad in ([257], [-1], [1, 2, 900]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            t.decode(bad)
    with pytest.raises(ValueError, match="give integers"):
        t.decode([1.5])
    for coder in (t, BPE):
        with pytest.raises(ValueError, match="character 1 of the text is the lone surrogate"):
            coder.encode("a\ud800b")


def test_tokenizers_that_can_not_be():
    with pytest.raises(ValueError, match="need 257"):
        Tokenizer(256)
    with pytest.raises(ValueError, match="need 258"):
        Tokenizer(257, ((b"a", b"b"),))
    with pytest.raises(ValueError, match="no earlier merge made"):
        Tokenizer(300, ((b"ab", b"c"), (b"a", b"b")))
    with pytest.raises(ValueError, match=r"set --model\.vocab to 257"):
        train_bpe(["a"], 256)


def test_tokenizer_files_are_loaded_strictly(tmp_path):
    path = tmp_path / "t.json"
    BPE.save(path)
    assert os.listdir(tmp_path) == ["t.json"]  # nothing left of the atomic write
    assert load_tokenizer(path) == BPE != byte_tokenizer()
    text = path.read_text("utf-8")
    path.write_text(json.dumps(json.loads(text)))  # layout is not content
    assert load_tokenizer(path) == BPE

    tree = json.loads(text)
    first, second = tree["model"]["merges"][:2]
    bad = {
        "cut": text[:-40],
        "empty": "",
        "list": "[]",
        "null": "null",
        "number": '{"model": {"vocab": 5, "merges": []}}',
        "nested": "[" * 100_000,
        "no merges": json.dumps({**tree, "model": {"vocab": {}}}),
        "extra key": json.dumps({**tree, "extra": 1}),
        "zero for false": text.replace('"fuse_unk": false', '"fuse_unk": 0'),
        "prefix space": text.replace('"add_prefix_space": false', '"add_prefix_space": true'),
        "swapped merges": json.dumps(
            {**tree, "model": {**tree["model"], "merges": [second, first]}}
        ),
        "moved id": text.replace('"a": 97', '"a": 98'),
        "not our alphabet": json.dumps(
            {**tree, "model": {**tree["model"], "merges": [[" ", "a"]]}}
        ),
    }
    for name, content in bad.items():
        assert content != text, name
        path.write_text(content, "utf-8")
        with pytest.raises(ValueError, match=r"t\.json .*build it again") as error:
            load_tokenizer(path)
        one_line(error)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="build it again"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="build it again"):
        load_tokenizer(tmp_path / "none.json")
