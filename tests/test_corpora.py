"""The documents of a corpus, the split, synthetic code."""

import ast
import hashlib
import keyword
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcjax import corpora
from mhcjax.corpora import Document, SyntheticCode, documents, split
from mhcjax.tokenizer import byte_tokenizer


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_folder_reads_text_in_order_and_skips_the_rest(tmp_path):
    for name, data in {
        "b.txt": b"b",
        "a/z.md": "é\r\n".encode(),
        "a.txt": b"a",
        "empty.txt": b"",
        "binary.bin": b"x\0y",
        "latin.txt": b"caf\xe9",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    found = documents(str(tmp_path))
    assert [(d.name, d.text) for d in found] == [
        ("a.txt", "a"),
        ("a/z.md", "é\r\n"),
        ("b.txt", "b"),
    ]
    assert [d.text for d in documents(str(tmp_path / ".hidden"))] == ["no"]  # asked for by name


def test_a_corpus_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\0")
    for bad in ("stdlibs", str(tmp_path / "none"), "", "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="does not exist: give stdlib, packages") as error:
            documents(bad)
        assert repr(bad) in one_line(error)
    for bad in (tmp_path, tmp_path / "binary"):
        with pytest.raises(ValueError, match="holds no text") as error:
            documents(str(bad))
        assert str(bad) in one_line(error)


def test_stdlib_leaves_out_tests_and_packages():
    found = documents("stdlib")
    names = {d.name for d in found}
    assert {"stdlib/ast.py", "stdlib/json/decoder.py"} <= names
    assert not any("/test/" in n or "idlelib" in n or "site-packages" in n for n in names)
    assert [d.name for d in found] == sorted(d.name for d in found)


def test_a_stripped_stdlib_adds_the_packages_and_says_so(tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "site"
    for folder in (library, packages):
        folder.mkdir()
        (folder / "same.py").write_text("same = 1\n")
    (library / "tests").mkdir()
    (library / "tests" / "x.py").write_text("no\n")
    (packages / "large.py").write_text("#" * 1_000_001)
    (packages / "own.py").write_text("own = 1\n")
    (packages / "data.txt").write_text("no\n")
    paths = {"stdlib": library, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(paths[name]))
    with pytest.warns(UserWarning, match=r"only 0\.0 MB of source: the installed packages"):
        found = documents("stdlib")
    assert [d.name for d in found] == ["stdlib/same.py", "packages/own.py", "packages/same.py"]
    assert len(split(found)[0]) + len(split(found)[1]) <= 3  # `same` once; one text may be cut

    (library / "long.py").write_text("long = 1\n" * 500_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [d.name for d in documents("stdlib")] == ["stdlib/long.py", "stdlib/same.py"]

    paths["purelib"] = paths["platlib"] = tmp_path / "none"
    with pytest.raises(ValueError, match="the corpus packages is empty"):
        documents("packages")


# split

DOCUMENTS = st.lists(st.text("ab\n", max_size=40), min_size=1, max_size=60)


@settings(deadline=None)
@given(DOCUMENTS)
def test_split_is_disjoint_complete_and_blind_to_copies(texts):
    found = [Document(str(i), text) for i, text in enumerate(texts)]
    total = sum(map(len, set(texts)))
    if total < 2:
        with pytest.raises(ValueError, match="at least two"):
            split(found)
        return
    train, validation = split(found)
    # every text once, nothing invented: the pieces of a cut document are adjacent
    assert sum(len(d.text) for d in train + validation) == total
    assert any(d.text for d in train) and any(d.text for d in validation)
    if not any("[" in d.name for d in train + validation):
        assert not {d.text for d in train} & {d.text for d in validation}
        assert {d.text for d in train + validation} == set(texts)
    again = split([*found, *[Document("copy", text) for text in texts]])
    assert again == (train, validation)


def test_split_by_content_takes_about_5_percent_whatever_the_names():
    found = [Document(f"{i}", f"text {i}\n") for i in range(4000)]
    train, validation = split(found)
    assert 150 < len(validation) < 250
    assert len(train) + len(validation) == 4000
    chosen = {d.text for d in validation}
    renamed = split([Document(f"other {d.name}", d.text) for d in reversed(found)])[1]
    assert {d.text for d in renamed} == chosen
    fewer = split(found[:2000])[1]
    assert {d.text for d in fewer} == chosen & {d.text for d in found[:2000]}
    changed = split([Document(d.name, d.text + "!") for d in found])[1]
    assert {d.text.rstrip("!") for d in changed} != chosen  # the content decides


def test_one_file_is_cut_at_a_line_near_95_percent():
    text = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,) = split([Document("f", text)])
    assert head.text + tail.text == text and head.text.endswith("\n")
    assert 0.90 < len(head.text) / len(text) <= 0.95
    assert (head.name, tail.name) == (f"f[:{len(head.text)}]", f"f[{len(head.text)}:]")
    (head,), (tail,) = split([Document("f", "title\n" + "x" * 994)])  # no line ends there
    assert len(head.text) == 950
    (head,), (tail,) = split([Document("f", "ab")])
    assert (head.text, tail.text) == ("a", "b")


def test_one_huge_validation_file_does_not_empty_the_train_split():
    def validates(text):  # the documented rule
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20 == 0

    huge = next(text for i in range(1000) if validates(text := f"{i}\n" * 999))
    train, validation = split([Document("a", "a\n"), Document("b", "b\n"), Document("h", huge)])
    assert 0.9 < sum(len(d.text) for d in train) / (len(huge) + 4) < 0.96
    assert len(validation) == 1 and validation[0].name.startswith("h[")
    small = [Document(str(i), f"{i}\n" * 999) for i in range(100, 400)]
    assert [d for d in small if validates(d.text)] == split(small)[1]


# synthetic code


def test_synthetic_code_is_python_of_lines_of_one_length():
    lines = SyntheticCode(statements=3000).text().splitlines(keepends=True)
    assert len(lines) == 3000 and {len(line) for line in lines} == {29}
    for node in ast.parse("".join(lines)).body:
        first, second = (a.arg for a in node.args.args)
        operands = {node.body[0].value.left.id, node.body[0].value.right.id}
        assert first != second and operands == {first, second}
        assert not keyword.iskeyword(node.name)


def test_synthetic_code_never_repeats_a_byte_and_depends_on_the_seed_alone():
    text = SyntheticCode(seed=5).text()
    ids = byte_tokenizer().encode(text)
    assert (ids[1:] == ids[:-1]).sum() == 0
    assert SyntheticCode(seed=5).text() == text
    assert SyntheticCode(seed=6).text() != text
    assert text.startswith(SyntheticCode(seed=5, statements=9).text())
    found = [d.text for d in documents("synthetic")]
    assert "".join(found) == SyntheticCode().text() and {len(d) for d in found} == {200 * 29}


def test_synthetic_floor_is_the_entropy_of_the_text():
    code = SyntheticCode(statements=60_000)
    lines = code.text().splitlines()
    # Entropy of each part from its counts, with the correction of Miller and Madow; the parts are
    # independent, which the test of pairs below looks at.
    parts = {
        "name": [line[4:8] for line in lines],
        "arguments": [(line[9], line[12]) for line in lines],
        "operator": [line[25] for line in lines],
        "order": [line[9] == line[23] for line in lines],
    }
    sizes = {"name": 10_000, "arguments": 650, "operator": 8, "order": 2}

    def entropy(values):
        counts = np.array(list(Counter(values).values()))
        p = counts / counts.sum()
        return -(p * np.log(p)).sum() + (len(counts) - 1) / (2 * counts.sum())

    for name, values in parts.items():
        assert entropy(values) == pytest.approx(math.log(sizes[name]), abs=0.01), name
    assert code.floor * 29 == pytest.approx(sum(map(math.log, sizes.values())), abs=1e-12)
    assert code.floor >= 0.25
    pair = [(line[25], line[9] == line[23], line[9]) for line in lines]
    assert entropy(pair) == pytest.approx(math.log(8 * 2 * 26), abs=0.01)
    # control: a choice that leans on another is seen
    leaning = [(line[25], line[25] in "+-*/") for line in lines]
    assert entropy(leaning) < math.log(8 * 2) - 0.5


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"statements": 0}])
def test_synthetic_code_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SyntheticCode(**bad)
