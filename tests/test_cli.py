"""The command line as a user meets it: exit codes, one line of error, commands that work."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small import ONE_LAYER

from mhcjax import __main__, checkpoint, data, gpt, loop, presets, runlog, runs, tokens
from mhcjax.config import PRESETS, override, preset
from mhcjax.presets import PRESETS as CONNECTIONS
from mhcjax.spec import init
from mhcjax.tokenizer import byte_tokenizer

SMALL = {
    **ONE_LAYER,
    "total_steps": 60,
    "log_every": 20,
    "eval_every": 60,
    "save_every": 30,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
TOKENS = (np.arange(2 * 32).reshape(2, 32) * 7 % 256).astype(np.int32)
VERBS = ["train", "sample", "diagnose", "inspect", "info"]


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A working folder with one trained run, runs/tiny."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHCJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def trained(project):
    """What training in this process had in memory when it saved: (logits, greedy ids)."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.Checkpoints.save
        config = override(preset("nano"), SMALL)
        graphdef = gpt.graph(config.model)
        forward = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))

        def spy(self, step, state, meta, **rest):
            tokenizer = byte_tokenizer()
            ids = [tokenizer.end, *tokenizer.encode("def ")]  # a prompt starts a document
            for _ in range(12):
                padded = np.pad(np.array(ids, np.int32), (0, 32 - len(ids)))
                logits = forward(state.params, np.stack([padded, padded]))
                ids.append(int(np.argmax(logits[0, len(ids) - 1, :257])))
            kept[step] = np.asarray(forward(state.params, TOKENS)), ids[5:]
            return save(self, step, state, meta, **rest)

        patch.setattr(checkpoint.Checkpoints, "save", spy)
        loop.fit(config, "runs/tiny", say=lambda line: None)
    return kept


@pytest.fixture
def cli(project, capsys, monkeypatch):
    """cli(*words) -> (exit code, stdout, stderr), in this process and in the working folder."""
    monkeypatch.chdir(project)
    capsys.readouterr()

    def call(*words):
        try:
            code = __main__.main([str(w) for w in words])
        except SystemExit as stop:  # argparse ends so
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def process(command, folder, **options):
    """A command in a process of its own; a text goes through the shell."""
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def contents(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


# -- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_parses(cli, verb):
    code, out, err = cli(verb, "--help")
    assert code == 0 and err == ""
    (example,) = re.findall(r"^example: (mhcjax .*)$", out, re.MULTILINE)
    args = __main__._parser().parse_args(shlex.split(example)[1:])
    assert args.verb == verb


def test_help_names_every_verb_and_every_field(cli):
    code, out, _ = cli("--help")
    assert code == 0 and set(VERBS) <= set(out.split())
    _, out, _ = cli("train", "--help")
    flags = set(re.findall(r"--[a-z][a-z0-9.-]*", out))
    named = {flag.split("=")[0] for flag in FLAGS}
    assert named <= flags and "--optim.weight-decay" in flags
    assert cli("--version")[:2] == (0, "mhcjax 0.1.0\n")


# -- bad input -------------------------------------------------------------------------------


def train(*flags):
    return ["train", "--run", "runs/new", *FLAGS, *flags]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ["VERB", "mhcjax --help"]),
        (["tran"], ["tran", "train"]),
        (["train", "--preset", "nono"], ["'nono'", "choose one of nano, d20, gpt2_124m"]),
        (["info", "--preset", "nono"], ["'nono'", "choose one of nano, d20, gpt2_124m"]),
        (["train", "--model.layer", "3"], ["--model.layer,", "did you mean --model.layers"]),
        (["info", "--optim.learningrate=3"], ["did you mean --optim.learning-rate"]),
        (["sample", "--promt", "a"], ["--promt", "did you mean --prompt"]),
        (["inspect", "a", "b"], ["unknown argument b"]),
        (train("--model.layers=six"), ["model.layers is 'six'", "give an int"]),
        (train("--optim.clip=big"), ["optim.clip is 'big'", "give a float"]),
        (train("--model.tied=maybe"), ["model.tied is 'maybe'", "give true or false"]),
        (train("--model.mlp=gelu"), ["model.mlp is 'gelu'", "choose one of relu2, swiglu"]),
        (train("--model.layers=0"), ["model.layers is 0", "at least 1"]),
        (train("--model.heads=3"), ["model.width 32", "3 heads"]),
        (train("--model.vocab=300"), ["not 300", "--model.vocab 257"]),
        (train("--model.connection.preset=mch"), ["'mch'", "choose one of"]),
        (train("--model.connection.init=flat"), ["'flat'", "choose one of"]),
        (train("--data.corpus=no/where"), ["no/where"]),
        (train("--data.length=64"), ["data.length 64", "model.context 32", "raise it"]),
        (train("--mesh.data=3"), ["data.batch, 4", "mesh.data 3", "one of [1, 2]"]),
        (train("--mesh.model=3", "--mesh.data=1"), ["model.heads, 2", "mesh.model 3", "of [1, 2]"]),
        (train("--mesh.data=64"), ["64 devices", "mesh.data at most 8"]),
        (train("--log-every=0"), ["log_every is 0", "at least 1"]),
        (train("--sample-every=-1"), ["sample_every is -1", "at least 0"]),
        (train("--data.micro-batches=0"), ["micro_batches is 0", "at least 1"]),
        (train("--resume=no/where"), ["no complete checkpoint in no/where"]),
        (["train", "--run", "runs/tiny", "--resume", "never", *FLAGS], ["another --run"]),
        (["train", "--run", "runs/tiny", "--seed", "5"], ["seed 0 -> 5", "drop these"]),
        (["train", "--run", "a file", *FLAGS], ["a file is a file", "--run"]),
        (["sample", "no/where"], ["no complete checkpoint in no/where"]),
        (["inspect", "no/where"], ["no complete checkpoint in no/where"]),
        (["diagnose", "no/where"], ["no complete checkpoint in no/where"]),
        (["inspect", "runs/tiny/checkpoints/9"], ["checkpoints/9", "steps 30, 60"]),
        (["sample", "runs/tiny", "--temperature", "-1"], ["temperature is -1.0", "at least 0"]),
        (["sample", "runs/tiny", "--top-p", "2"], ["top_p is 2.0", "(0, 1]"]),
        (["sample", "runs/tiny", "--tokens", "many"], ["--tokens", "'many'"]),
        (["info", "--no-compile", "--device", "abacus"], ["'abacus'", "NVIDIA H200"]),
    ],
    ids=lambda value: " ".join(w for w in value if w not in FLAGS)[:60],
)
def test_bad_input_is_one_line_that_names_the_fix(cli, trained, project, words, expected):
    (project / "a file").write_text("")
    before = contents(project)
    code, _, err = cli(*words)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("mhcjax") and "Traceback" not in line
    for text in expected:
        assert text in line
    assert contents(project) == before


@pytest.mark.parametrize("verb", ["sample", "inspect", "diagnose"])
def test_without_any_run_it_says_so(tmp_path, cli, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(verb)
    assert (code, out) == (2, "")
    assert err == f"mhcjax {verb}: no run under runs/: train one first, or name its folder\n"


@pytest.fixture(scope="module")
def damaged(trained, project, tmp_path_factory):
    """A copy of the run with one flipped bit in the newest weights."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(project / "runs" / "tiny", run)
    params = run / "checkpoints" / "60" / "params"
    file = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    return run


@pytest.mark.parametrize(
    "words", [["sample"], ["inspect"], ["diagnose"], ["train", "--total-steps=61", "--run"]]
)
def test_a_flipped_bit_in_a_checkpoint(cli, damaged, words):
    before = contents(damaged)
    code, _, err = cli(*words, damaged)
    assert code == 2
    (line,) = err.splitlines()
    assert str(damaged / "checkpoints" / "60") in line and "use another step" in line
    assert "has step 30" in line
    assert contents(damaged) == before
    if words == ["inspect"]:  # and the fix helps
        assert cli("inspect", damaged / "checkpoints" / "30")[0] == 0


def test_bad_input_in_a_real_process(tmp_path):
    """Nothing that a library prints at import or exit comes between."""
    command = [sys.executable, "-m", "mhcjax", *train("--data.corpus=no/where")]
    done = process(command, tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("mhcjax train: ") and "no/where" in line
    assert list(tmp_path.iterdir()) == []


# -- errors that are not the user's ----------------------------------------------------------


def test_an_error_from_elsewhere_keeps_its_traceback(cli, monkeypatch):
    def fails(args):
        return np.zeros(3).reshape(2)

    monkeypatch.setitem(__main__.VERBS, "info", fails)
    with pytest.raises(ValueError, match="cannot reshape"):
        cli("info")

    def ours(args):
        return preset("a\nb")

    monkeypatch.setitem(__main__.VERBS, "info", ours)
    code, _, err = cli("info")
    assert code == 2 and len(err.splitlines()) == 1 and "choose one of" in err


def test_interrupted_and_cut_off(cli, monkeypatch, tmp_path):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(__main__.VERBS, "info", interrupted)
    assert cli("info") == (130, "", "")
    command = f"({sys.executable} -m mhcjax info --no-compile; echo code $? >&2) | true"
    for unbuffered in ("", "1"):
        done = process(command, tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
        assert done.stderr == "code 141\n"


# -- from training to sampling ---------------------------------------------------------------

LOGITS = """
import sys, jax, numpy as np
from flax import nnx
from mhcjax import gpt, runs, sample

loaded, tokens = runs.load("runs/tiny"), np.load("tokens.npy")
config, rows, half = loaded.config.model, len(tokens), tokens.shape[1] // 2
whole = nnx.merge(loaded.graphdef, loaded.params)(tokens)
last, cache = sample.prefill(
    loaded.graphdef, loaded.params, tokens[:, :half], np.full(rows, half, np.int32),
    gpt.empty_cache(config, rows),
)
stepped = [last]
for t in range(half, tokens.shape[1]):
    position = np.full(rows, t, np.int32)
    last, cache = sample.decode_step(
        loaded.graphdef, loaded.params, tokens[:, t], position, cache
    )
    stepped.append(last)
fresh = gpt.build(config, key=jax.random.key(loaded.config.seed))[1]
np.savez("logits.npz", whole=whole, stepped=np.stack(stepped, 1),
         fresh=nnx.merge(loaded.graphdef, fresh)(tokens))
"""


def test_a_new_process_gives_the_logits_of_training(trained, project):
    logits, _ = trained[60]
    np.save(project / "tokens.npy", TOKENS)
    try:
        done = process([sys.executable, "-c", LOGITS], project)
        assert done.returncode == 0, done.stderr
        with np.load(project / "logits.npz") as found:
            whole, stepped, fresh = (found[n] for n in ("whole", "stepped", "fresh"))
    finally:
        (project / "tokens.npy").unlink()
        (project / "logits.npz").unlink(missing_ok=True)
    scale = max(1.0, float(np.abs(logits).max()))
    # The same float32 sums, in the order of another compiled program.
    assert np.abs(whole - logits).max() <= 1e-5 * scale
    assert np.abs(stepped - logits[:, 15:]).max() <= 1e-5 * scale
    assert (whole.argmax(-1) == logits.argmax(-1)).all()
    assert np.abs(whole - fresh).max() > 0.1 * scale
    assert np.abs(trained[30][0] - logits).max() > 0.01 * scale  # nor another checkpoint


def test_sample_in_a_new_process_continues_as_training_would(trained, project):
    _, greedy = trained[60]
    command = [sys.executable, "-m", "mhcjax", "sample", "runs/tiny", "--json"]
    command += ["--prompt", "def ", "--temperature", "0", "--tokens", "12"]
    done = process(command, project)
    assert done.returncode == 0 and done.stderr == ""
    (row,) = json.loads(done.stdout)
    assert row["prompt"] == "def " and row["finish"] == "length"
    assert row["text"] == byte_tokenizer().decode(greedy)


def test_the_printed_commands_work_verbatim(tmp_path):
    """From the last lines of a run to a shell, in a folder whose name needs quotes."""
    few = ["--total-steps=3", "--eval-every=3", "--save-every=3", "--run", "runs/it's one"]
    command = [sys.executable, "-m", "mhcjax", "train", *FLAGS, *few]
    done = process(command, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines()[-3:])
    assert list(printed) == ["sample", "inspect", "resume"]
    results = {name: process(line.strip(), tmp_path) for name, line in printed.items()}
    for name, result in results.items():
        assert result.returncode == 0 and result.stderr == "", (name, result.stderr)
    assert results["sample"].stdout.startswith("def __init__(self")
    assert len(results["sample"].stdout) > len("def __init__(self\n")
    assert "runs/it's one/checkpoints/3" in results["inspect"].stdout
    assert "0 attention" in results["inspect"].stdout
    assert "going on from" in results["resume"].stdout
    assert checkpoint.describe(tmp_path / "runs" / "it's one")["step"] == 6


def test_command_is_how_it_was_called(monkeypatch, tmp_path):
    script = tmp_path / "bin" / "mhcjax"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", str(script.parent))
    assert __main__.command() == "mhcjax"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert __main__.command() == "bin/mhcjax"
    module = f"{shlex.quote(sys.executable)} -m mhcjax"
    for called in ("pytest", "", str(Path(__main__.__file__))):
        monkeypatch.setattr(sys, "argv", [called])
        assert __main__.command() == module


# -- the verbs -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sample", "inspect", "diagnose"])
def test_without_a_path_the_newest_run_is_taken_and_named(cli, trained, project, verb):
    old = project / "runs" / "older"
    old.mkdir(exist_ok=True)
    (old / "config.json").write_text("not the newest, so never read")
    os.utime(old / "config.json", (1e9, 1e9))
    try:
        words = ["--tokens", "2"] if verb == "sample" else []
        code, out, err = cli(verb, "--json", *words)
        assert code in ((0, 1) if verb == "diagnose" else (0,))
        assert err == "newest run: runs/tiny\n"
        assert json.loads(out)
        assert json.loads(cli(verb, "runs/tiny", "--json", *words)[1]) == json.loads(out)
    finally:
        shutil.rmtree(old)


def test_sample(cli, trained):
    one = cli("sample", "runs/tiny", "--tokens", 8, "--seed", 3, "--prompt", "def ")
    assert one[0] == 0 and one[1].startswith("def ") and one[2] == ""
    again = cli("sample", "runs/tiny", "--tokens", 8, "--seed", 3, "--prompt", "def ")
    assert again == one
    many = cli("sample", "runs/tiny", "--tokens", 8, "--prompt", "a", "--prompt", "def b")
    assert re.findall(r"^--- '(.*)' \(length\)$", many[1], re.MULTILINE) == ["a", "def b"]
    code, out, _ = cli("sample", "runs/tiny", "--json", "--tokens", 2, "--stop", ":")
    (row,) = json.loads(out)
    assert code == 0 and set(row) == {"prompt", "text", "finish"}
    assert row["prompt"] == "def __init__(self"


def test_inspect(cli, trained):
    code, out, err = cli("inspect", "runs/tiny", "--json")
    rows = json.loads(out)
    assert code == 0 and err == ""
    assert [r["sublayer"] for r in rows] == ["0 attention", "1 mlp"]
    loaded = runs.load("runs/tiny")
    leaf = loaded.params["blocks"]["attention_connection"]["alpha_logit"]
    alpha = 1 / (1 + math.exp(-float(np.ravel(leaf)[0])))
    assert rows[0]["alpha"] == pytest.approx(alpha, abs=1e-4)  # printed with four digits
    table = cli("inspect", "runs/tiny")[1]
    assert table.startswith("runs/tiny/checkpoints/60: nano-36.9k-mhc_n2, step 60\n")
    assert f"{alpha:.3f}" in table
    assert cli("inspect", "runs/tiny/checkpoints/30")[1].splitlines()[0].endswith("step 30")


def test_diagnose_exits_by_what_it_finds(cli, trained, project, tmp_path):
    code, out, _ = cli("diagnose", "runs/tiny", "--json")
    checks = {c["name"]: c["status"] for c in json.loads(out)}
    assert code == (1 if "fail" in checks.values() else 0)
    assert {"parity", "causality", "fingerprint", "streams"} <= {
        name for name, status in checks.items() if status == "pass"
    }
    code, table, _ = cli("diagnose", "runs/tiny")
    failed = sum(line.startswith("fail ") for line in table.splitlines())
    assert f"{len(checks) - failed} checks passed, {failed} failed" in table
    assert code == (1 if failed else 0) == 0, table
    # A checkpoint of an untrained model is found out.
    config = override(preset("nano"), SMALL)
    fresh = gpt.build(config.model, key=jax.random.key(config.seed))[1]
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(1, {"params": fresh}, checkpoint.describe(project / "runs" / "tiny"))
    code, table, _ = cli("diagnose", tmp_path)
    assert code == 1
    assert re.search(r"^fail +fingerprint .* fresh init", table, re.MULTILINE)
    assert re.search(r"^fail +target shift ", table, re.MULTILINE)


def test_a_changed_corpus_is_noted(cli, trained, monkeypatch, tmp_path):
    """The figures of inspect are then those of another text; nothing else stands in the way."""
    real = tokens.build
    text = tmp_path / "other.py"
    text.write_text("".join(f"x{i} = {i}\n" for i in range(200)))
    monkeypatch.setattr(tokens, "build", lambda corpus, *rest, **kw: real(str(text), *rest, **kw))
    code, out, err = cli("inspect", "runs/tiny", "--json")
    assert code == 0 and json.loads(out)
    assert err.startswith("note: 'synthetic' is not the text that this model was trained on")


@pytest.mark.parametrize("name", list(PRESETS))
def test_info_counts_the_leaves(cli, name):
    code, out, err = cli("info", "--preset", name, "--no-compile", "--json")
    found = json.loads(out)
    leaves = jax.tree.leaves(gpt.abstract_params(PRESETS[name].model))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert code == 0 and err == ""
    assert found["parameters"] == count == sum(found["parameters by group"].values())
    assert found["parameter bytes"] == sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves
    )
    size = float(re.search(r"-([\d.]+)M-", found["model"])[1])
    assert size == pytest.approx(count / 1e6, abs=0.05)
    text = cli("info", "--preset", name, "--no-compile")[1]
    assert re.search(rf"^parameters +{count:,}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", list(CONNECTIONS))
def test_info_explains_every_connection(cli, name):
    code, out, err = cli("info", "--connection", name, "--model.width", "64", "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    spec = presets.named(name, **({"layers": 8} if "layers" in presets.takes(name) else {}))
    params = init(spec, width=64, key=jax.random.key(0))
    assert found["parameters per sublayer"] == sum(a.size for a in params.values())
    assert {leaf: list(a.shape) for leaf, a in params.items()} == found["parameters"]
    assert found["connection"] == repr(spec)
    text = cli("info", "--connection", name, "--model.width", "64")[1]
    assert "formula" in text and "bytes per token and sublayer, forward" in text


def test_info_states_the_counts_of_the_publications(cli):
    """mHC's (n^2 + 2n)(nC + 1) + 3 at C = 5120, n = 4, and the bytes of an ideal kernel."""
    found = json.loads(cli("info", "--connection", "mhc", "--model.width", "5120", "--json")[1])
    assert found["parameters per sublayer"] == 491_547
    streams = 2 * 5120  # bytes of one in bfloat16
    coefficients = 4 * (16 + 8)
    assert found["bytes per token and sublayer, forward"] == 14 * streams + 2 * coefficients
    both = found["bytes per token and sublayer, forward and backward"]
    assert both == 41 * streams + 5 * coefficients
    static = json.loads(cli("info", "--connection", "mhc_n2", "--model.width", "64", "--json")[1])
    assert static["bytes per token and sublayer, forward and backward"] == 23 * 128


def test_another_preset_leaves_the_old_ones_init_behind(cli):
    """nano starts at near_identity, which mhc does not know."""
    code, out, _ = cli("info", "--no-compile", "--model.connection.preset", "mhc", "--json")
    assert code == 0 and "Sinkhorn()" in json.loads(out)["connection"]
    init = ("--model.connection.init", "depth")
    code, out, _ = cli("info", "--no-compile", "--model.connection.preset", "mhc", *init, "--json")
    assert code == 0 and "keep=0.5" in json.loads(out)["connection"]
    code, _, err = cli("info", "--connection", "mhc", "--model.connection.init", "best")
    assert code == 2 and err.count("\n") == 1 and "published, depth" in err


def test_info_of_the_small_config_is_that_of_the_checkpoint(cli, trained):
    code, out, _ = cli("info", *FLAGS, "--json", "--device", "h200")
    found = json.loads(out)
    tree = checkpoint.describe("runs/tiny")["tree"]
    sizes = [math.prod(shape) for name, (shape, _) in tree.items() if name.startswith("params/")]
    assert code == 0 and found["parameters"] == sum(sizes)
    assert found["device memory bytes"] == 141_000_000_000 and found["fits"] is True
    assert found["step memory bytes"] > found["parameter bytes"] + found["optimizer bytes"]
    assert found["tokens per update"] == 4 * 32
    work = found["tokens per update"] * found["FLOPs per token"]
    assert found["seconds per update at 40 % of peak"] == pytest.approx(work / (0.4 * 989e12))
    assert "fits" in cli("info", *FLAGS, "--device", "h200")[1]
    assert "fits" not in cli("info", *FLAGS)[1]


def test_train_names_its_folder_by_the_counted_model(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", *FLAGS, "--dry-run")
    assert code == 0 and err == ""
    assert out.startswith("run folder: runs/nano-36.9k-mhc_n2\n")
    assert "36,874 parameters" in out and list(tmp_path.iterdir()) == []


def test_the_held_out_text_is_that_of_training(trained):
    """inspect and diagnose look at the text on which the run was evaluated."""
    loaded = runs.load("runs/tiny")
    rows = __main__._text(loaded, 4)
    corpus = tokens.build("synthetic", "byte", 257)
    held = data.open_tokens(corpus.validation, corpus.dtype)
    assert corpus.sha256 == loaded.meta["corpus"]
    assert all(bytes(r.astype(np.uint8)) in bytes(held.astype(np.uint8)) for r in rows)
    assert runlog.read_rows("runs/tiny", "eval")[-1]["step"] == 60
