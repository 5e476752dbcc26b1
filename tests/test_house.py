"""The house rules that a reader cannot check by eye: imports, docstrings, sizes, words.

Everything is read from the source with `ast`, so that no module has to import to be checked. Each
rule is a function from source text to faults, and is shown to find a fault in text that has one.
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mhcjax"

# A module imports only modules above it. `manifolds` and `kernels` are packages: the parts of one
# count as one module.
ORDER = [
    "manifolds",
    "kernels",
    "coefficients",
    "spec",
    "connections",
    "ends",
    "rules",
    "converters",
    "published",
    "presets",
    "diagnostics",
    "testing",
    "config",
    "sharding",
    "processes",
    "cluster",
    "head",
    "layers",
    "gpt",
    "corpora",
    "tokenizer",
    "tokens",
    "data",
    "optim",
    "train",
    "costs",
    "plan",
    "sample",
    "audit",
    "plots",
    "checkpoint",
    "formats",
    "runlog",
    "runs",
    "loop",
    "__main__",
]
CORE = [
    "manifolds",
    "coefficients",
    "spec",
    "connections",
    "ends",
    "rules",
    "converters",
    "published",
    "presets",
    "diagnostics",
]
# `import mhcjax` brings the core, so it may stand wherever the core may.
PACKAGE_LEVEL = ORDER.index("diagnostics")

# What a module may import besides the standard library and mhcjax; others: what pyproject declares.
# NumPy counts with JAX, which cannot be installed without it.
THIRD_PARTY = {
    **{name: {"jax", "numpy"} for name in ["__init__", *CORE, "sharding", "processes", "cluster"]},
    "kernels": {"jax", "numpy"},
    "converters": {"numpy"},
    "testing": {"jax", "numpy", "hypothesis", "chex"},
    "config": set(),
}

PACKAGES = ("manifolds", "kernels")
LINES = 500  # beyond this a file is more than one subject: split it by noun

FILES = sorted(SOURCE.rglob("*.py"))
_IDS = [str(path.relative_to(SOURCE)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=_IDS)


def module_of(path):
    """The name in ORDER: "kernels" for every part of that package."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(text, module):
    """(names in mhcjax, top names elsewhere) that a module imports, anywhere in its text."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "mhcjax":
            # A submodule by its name; anything else is the package's own.
            dotted = [
                f"mhcjax.{a.name}" if a.name in ORDER else "mhcjax.__init__" for a in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            dotted = [node.module]
        elif isinstance(node, ast.ImportFrom):
            package = [module] if module in PACKAGES and node.level == 1 else []
            rest = [*package, *(node.module or "").split(".")]
            names = [part for part in rest if part] or [alias.name for alias in node.names]
            dotted = [f"mhcjax.{names[0]}"]
        else:
            continue
        for name in dotted:
            top, *rest = name.split(".")
            if top != "mhcjax":
                other.add(top)
            else:
                own.add(rest[0] if rest else "__init__")
    return own, other


def wrong_imports(text, module):
    """Imports that the order or the table of third parties forbids."""
    own, other = imports(text, module)
    foreign = {name for name in other if name not in sys.stdlib_module_names}
    faults = sorted(foreign - THIRD_PARTY.get(module, foreign))
    if module == "__init__":
        return faults + sorted(own - set(CORE))
    here = ORDER.index(module)
    for name in sorted(own - {module}):
        known = {"__init__": PACKAGE_LEVEL, **{other: i for i, other in enumerate(ORDER)}}
        if known.get(name, here) >= here:
            faults.append(f"mhcjax.{name}")
    return faults


@each_file
def test_imports_point_upwards(path):
    module = module_of(path)
    assert module in (*ORDER, "__init__"), f"{module}.py has no place in the order of the house"
    faults = wrong_imports(path.read_text(), module)
    assert not faults, f"{path.name} may not import {', '.join(faults)}"


@pytest.mark.parametrize(
    "module, text, fault",
    [
        ("manifolds", "from mhcjax.connections import mix", "mhcjax.connections"),
        ("manifolds", "def f():\n    import flax", "flax"),
        ("manifolds", "import mhcjax", "mhcjax.__init__"),
        ("diagnostics", "from mhcjax import Connection", "mhcjax.__init__"),
        ("presets", "from . import diagnostics", "mhcjax.diagnostics"),
        ("presets", "from .diagnostics import entropy", "mhcjax.diagnostics"),
        ("connections", "import scipy.special", "scipy"),
        ("kernels", "import scipy.linalg", "scipy"),
        ("kernels", "from mhcjax.connections import Mix", "mhcjax.connections"),
        ("config", "import jax", "jax"),
        ("config", "from mhcjax import gpt", "mhcjax.gpt"),
        ("gpt", "from mhcjax.train import State", "mhcjax.train"),
        ("testing", "import pytest", "pytest"),
        ("__init__", "from mhcjax.gpt import GPT", "gpt"),
        ("__init__", "from mhcjax import presets, config", "config"),
    ],
)
def test_a_wrong_import_is_found(module, text, fault):
    assert wrong_imports(text, module) == [fault]


@pytest.mark.parametrize(
    "module, text",
    [
        (
            "connections",
            "from mhcjax.manifolds import Manifold\nimport jax.numpy as jnp\nimport os",
        ),
        ("kernels", "from .tiles import block\nfrom mhcjax.kernels import read\nimport jax"),
        ("gpt", "import mhcjax as mhc\nfrom mhcjax import sharding\nfrom mhcjax import connect"),
        ("__init__", "from mhcjax import presets\nfrom mhcjax.manifolds import MANIFOLDS"),
    ],
)
def test_a_right_import_is_not(module, text):
    assert wrong_imports(text, module) == []


# --------------------------------------------------------------------------------------------------
# Docstrings


def public(text):
    """The definitions that `__all__` names, or without one the public ones: {name: node}."""
    body = ast.parse(text).body
    defined = {
        node.name: node
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return {name: defined[name] for name in names if name in defined}
    return {name: node for name, node in defined.items() if not name.startswith("_")}


def undocumented(text, examples):
    """Public names without a docstring, and public functions without an example."""
    faults = []
    for name, node in public(text).items():
        docstring = ast.get_docstring(node) or ""
        if not docstring:
            faults.append(f"{name} has no docstring")
        elif examples and not isinstance(node, ast.ClassDef) and ">>> " not in docstring:
            faults.append(f"{name} has no example")
    return faults


@each_file
def test_public_names_have_docstrings(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
    faults = undocumented(text, examples=module_of(path) in (*CORE, "testing"))
    assert not faults, f"{path.name}: {'; '.join(faults)}"


def test_a_missing_docstring_is_found():
    text = (
        '__all__ = ["f", "g", "K"]\n'
        "def f(): pass\n"
        'def g():\n    "One line."\n'
        'class K:\n    "One line."\n'
        "def other(): pass\n"
    )
    assert undocumented(text, examples=False) == ["f has no docstring"]
    assert undocumented(text, examples=True) == ["f has no docstring", "g has no example"]


@pytest.mark.parametrize("module", CORE)
def test_examples_of_jitted_functions_are_found_by_doctest(module):
    # A jitted function is no Python function: an example that doctest passes over proves nothing.
    found = doctest.DocTestFinder().find(importlib.import_module(f"mhcjax.{module}"))
    run = {test.name.rsplit(".", 1)[-1] for test in found if test.examples}
    file = SOURCE / f"{module}.py"
    text = (file if file.exists() else SOURCE / module / "__init__.py").read_text()
    functions = {n for n, node in public(text).items() if isinstance(node, ast.FunctionDef)}
    assert functions and functions <= run


@pytest.mark.parametrize("module", [*CORE, "testing", "config"])
def test_all_names_exist(module):
    loaded = importlib.import_module(f"mhcjax.{module}")
    assert list(loaded.__all__) == sorted(loaded.__all__, key=lambda n: (not n.isupper(), n))
    assert all(hasattr(loaded, name) for name in loaded.__all__)


# --------------------------------------------------------------------------------------------------
# Assertions, size, words, dependencies


def asserts(text):
    """Lines with an assert statement: `python -O` removes them, so nothing may rest on one."""
    return [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]


@each_file
def test_no_assert_in_the_library(path):
    # Not in testing.py either: it raises AssertionError itself, and so holds under `python -O`.
    assert asserts(path.read_text()) == [], f"{path.name}: raise a ValueError that names the value"


def test_an_assert_is_found():
    assert asserts("def f(x):\n    assert x") == [2]


@each_file
def test_files_are_one_subject_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LINES, f"{path.name} has {lines} lines, the limit is {LINES}: split it by noun"


# Put together here, so that this file does not contain what it looks for.
WORDS = ["/wo" + "rk/", "/ro" + "ot/", "sand" + "box", "work" + "place"]
TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".json", ".cff", ".cfg", ".yml", ".yaml", ".csv"}


def tracked_files():
    """What git tracks or would add; without git, all files outside hidden and built folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in listed.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"(^|/)(\.|build/|dist/|runs/|__pycache__/)|\.egg-info/")
        paths = [p for p in ROOT.rglob("*") if not skipped.search(p.relative_to(ROOT).as_posix())]
    return [p for p in paths if p.is_file() and (p.suffix in TEXT or not p.suffix)]


def forbidden_words(text):
    """(line, word) of paths of one machine and words that mean nothing to a reader elsewhere."""
    return [
        (number, word)
        for number, line in enumerate(text.splitlines(), start=1)
        for word in WORDS
        if word in line.lower()
    ]


def test_no_text_speaks_of_one_machine():
    files = tracked_files()
    assert Path(__file__).resolve() in files and SOURCE / "connections.py" in files
    faults = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := forbidden_words(path.read_text(errors="replace")))
    }
    assert not faults


@pytest.mark.parametrize("word", WORDS)
def test_such_a_word_is_found(word):
    assert forbidden_words(f"fine\nat {word.upper()}main") == [(2, word)]


# The name that a distribution is imported by, where it is not its own.
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "tensorboardx": "tensorboardX"}


def requirements(text):
    """[(name, has a comment)] of every requirement of the library and its extras but test and dev,
    which serve the tests."""
    project = tomllib.loads(text)["project"]
    extras = project.get("optional-dependencies", {})
    listed = [*project.get("dependencies", [])]
    listed += [r for name, group in extras.items() if name not in ("test", "dev") for r in group]
    lines = text.splitlines()
    found = []
    for requirement in listed:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        (line, *_) = [one for one in lines if f'"{requirement}"' in one]
        found.append((name, "#" in line))
    return found


def unused_dependencies(text, imported):
    """Requirements that nothing imports and no comment explains."""
    return [
        name
        for name, explained in requirements(text)
        if IMPORT_NAMES.get(name, name) not in imported and not explained
    ]


def test_every_dependency_is_imported_or_explained():
    imported = {name for path in FILES for name in imports(path.read_text(), module_of(path))[1]}
    assert unused_dependencies((ROOT / "pyproject.toml").read_text(), imported) == []


def test_every_import_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    listed = [name for name, _ in requirements(text)] + ["hypothesis", "chex"]
    assert {"hypothesis", "chex"} <= {re.match(r"[\w-]+", r)[0] for r in extras["test"]}
    declared = {IMPORT_NAMES.get(name, name) for name in listed}
    for path in FILES:
        foreign = imports(path.read_text(), module_of(path))[1] - sys.stdlib_module_names
        assert foreign <= declared, f"{path.name} imports {sorted(foreign - declared)}, undeclared"


def test_an_unused_dependency_is_found():
    text = (
        "[project]\ndependencies = [\n"
        '  "jax>=0.10",\n  "torch>=2",\n  "flatbuffers",  # jax.export needs it\n'
        '  "orbax-checkpoint>=0.12",\n]\n'
        '[project.optional-dependencies]\ntest = ["pytest>=8"]\ntb = ["tensorboardX>=2.6"]\n'
    )
    assert unused_dependencies(text, {"jax", "orbax"}) == ["torch", "tensorboardx"]


def test_the_core_imports_nothing_heavy():
    # In a process of its own: here other tests have imported everything.
    code = "import sys, mhcjax; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert {"jax", "mhcjax"} <= loaded
    assert not loaded & {"flax", "optax", "orbax", "hypothesis", "matplotlib", "tokenizers"}
