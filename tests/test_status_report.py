"""docs/status-report.md names only tests and files that exist, and has every item of its list.

Whether a test proves what the page says is for a reader to judge; that it is there is checked here.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "status-report.md"
ITEMS = 23

NAME = re.compile(r"(tests/[\w/]+\.py)::([\w:]+)")
# One word with a slash, or a file by its ending. A command has spaces, a flag or a field no ending.
PATH = re.compile(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(py|md|toml|json|ipynb|cff)|Makefile")


@cache
def names_in(path):
    """The names that pytest collects from a file: functions, and methods as Class::method."""
    if not path.is_file():
        return set()
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {
            prefix + part.name
            for part in inner
            if isinstance(part, ast.FunctionDef) and part.name.startswith("test")
        }
    return found


def missing(text):
    """Tests and paths that the text names and the repository does not have, and odd backticks."""
    faults = [
        f"{path}::{name}" for path, name in NAME.findall(text) if name not in names_in(ROOT / path)
    ]
    for quoted in re.findall(r"`([^`]*)`", text):
        # Outside backticks a name is checked too, but one that a line break cuts would be missed.
        odd = "::" in quoted and not NAME.fullmatch(quoted)
        if odd or (PATH.fullmatch(quoted) and not (ROOT / quoted).exists()):
            faults.append(quoted)
    return faults


def items(text):
    return [int(n) for n in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]


def test_every_name_on_the_page_exists():
    text = PAGE.read_text()
    assert missing(text) == []
    # They are found at all: a page whose names the pattern misses would pass.
    assert len(set(NAME.findall(text))) > ITEMS and text.count("::") == len(NAME.findall(text))


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_gpt.py::test_parity_of_everything",
        "tests/test_gpt.py::test_parit",
        "tests/test_nowhere.py::test_parity",
        "tests/test_status_report.py::missing",
        "tests/test_gpt.py::test_parity and more",
        "tests/test_nowhere.py",
        "experiments/results/made_up.md",
        "experiments/e99_made_up.py",
        "made_up.md",
    ],
)
def test_a_made_up_name_is_found(name):
    text = PAGE.read_text()
    assert missing(f"{text}\nAnd `{name}`.\n") == [name]


def test_what_is_there_is_not_a_fault():
    there = ["tests/test_gpt.py::test_parity", "tests", "docs/status-report.md", "Makefile"]
    other = ["mhcjax inspect", "python -m experiments.run e01 --local", "alpha_logit", "x / y"]
    assert missing(" ".join(f"`{quoted}`" for quoted in there + other)) == []


def test_all_items_are_there_in_order():
    text = PAGE.read_text()
    assert items(text) == list(range(1, ITEMS + 1))
    assert items(text.replace("## 7. ", "## ")) != list(range(1, ITEMS + 1))


def test_each_item_says_what_was_said_what_was_true_and_what_shows_it():
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        for part in ("Said", "True", "Here"):
            assert section.count(f"- **{part}:** ") == 1, (section.splitlines()[0], part)
        shown = section.split("- **Here:** ")[1]
        assert NAME.search(shown) or "not built here yet" in shown, section.splitlines()[0]


def test_lines_fit():
    lines = PAGE.read_text().splitlines()
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []
