"""The command line: mhcjax train | sample | diagnose | inspect | info.

Exit codes: 0 success, 1 a failed check or a run that diverged, 2 bad input (one line that names the
fix), 3 another process of the run is gone, 128 + signal when a signal stopped a run that was saved.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mhcjax.config import PRESETS, Config, fields, from_json, override, preset, to_json

__all__ = ["command", "main", "use_compilation_cache"]


class _Parser(argparse.ArgumentParser):
    """One line of error, exit code 2; an unknown option is answered with the nearest one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            name = extra[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown argument {name}" + (f", did you mean {near[0]}" if near else ""))
        return found, extra

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_config(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of the config, by its dotted name."""
    group = parser.add_argument_group("config (the defaults shown are those of preset nano)")
    for name, kind, value, help in fields(Config()):
        if name == "name":
            continue
        choices = [c for a in (kind, *typing.get_args(kind)) for c in typing.get_args(a)]
        words = [str(c) for c in choices if isinstance(c, str)]
        shown = f" ({', '.join(words)})" if words else ""
        text = f"{help}{shown} [{value}]".replace("%", "%%")
        group.add_argument(_flag(name), dest=f"config:{name}", metavar="X", help=text)


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    return {
        name.removeprefix("config:"): value
        for name, value in vars(args).items()
        if name.startswith("config:") and value is not None
    }


def command() -> str:
    """How this program was called, so that a printed command can be pasted.

    >>> isinstance(command(), str)
    True
    """
    called = sys.argv[0] if sys.argv and sys.argv[0] else ""
    if called.endswith("__main__.py") or Path(called).stem != "mhcjax":
        return f"{shlex.quote(sys.executable)} -m mhcjax"
    found = shutil.which("mhcjax")
    if found and Path(found).resolve() == Path(called).resolve():
        return "mhcjax"
    return shlex.quote(os.path.relpath(called))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mhcjax",
        description="Train, sample and examine language models with hyper-connections.",
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    p = verb(
        "train",
        "train a model, or go on with a run",
        "mhcjax train --preset nano --run runs/first --total-steps 300 --model.layers 6",
    )
    p.add_argument("--preset", help=f"start from {', '.join(PRESETS)} [nano]")
    p.add_argument("--run", type=Path, help="the run's folder [runs/<model name>]")
    p.add_argument("--resume", default="auto", help="auto, never, or a checkpoint to start from")
    p.add_argument("--dry-run", action="store_true", help="compile, print the plan, train nothing")
    group = p.add_argument_group("several processes (one command per host, see docs/clusters.md)")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0; auto: as JAX reads it from the environment [auto under srun, mpirun]",
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many [as the launcher says]")
    group.add_argument("--process", type=int, metavar="I", help="which one, from 0 [likewise]")
    group.add_argument(
        "--heartbeat",
        type=int,
        metavar="S",
        default=30,
        help="seconds of silence after which a process counts as dead [30]",
    )
    _add_config(p)

    p = verb(
        "sample",
        "continue prompts",
        "mhcjax sample runs/first --prompt 'class Reader' --tokens 200",
    )
    _add_path(p)
    p.add_argument(
        "--prompt",
        action="append",
        help="text to go on from; may be repeated ['def __init__(self']",
    )
    p.add_argument("--tokens", type=int, default=96, help="most tokens to add [96]")
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [0.8]")
    p.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 is off [0]")
    p.add_argument("--top-p", type=float, default=1.0, help="keep this much probability [1]")
    p.add_argument("--min-p", type=float, default=0.0, help="share of the likeliest to keep [0]")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text [0]")
    p.add_argument("--stop", action="append", default=[], help="end at this text; may be repeated")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = verb(
        "diagnose", "check a checkpoint; exit 1 when a check fails", "mhcjax diagnose runs/first"
    )
    _add_path(p)
    p.add_argument("--json", action="store_true", help="print JSON")

    p = verb("inspect", "print what each sublayer's connection does", "mhcjax inspect runs/first")
    _add_path(p)
    p.add_argument("--json", action="store_true", help="print JSON")

    p = verb(
        "info",
        "count a config: parameters, memory, FLOPs",
        "mhcjax info --preset gpt2_124m --device h200",
    )
    p.add_argument("--preset", default="nano", help=f"{', '.join(PRESETS)} [nano]")
    p.add_argument("--device", help="a device kind to hold the figures against, e.g. h200")
    p.add_argument(
        "--connection",
        metavar="NAME",
        help="explain a connection by its preset's name: formula, parameters, bytes, init",
    )
    p.add_argument(
        "--mesh",
        metavar="data=64,sequence=2,model=8",
        help="plan for that mesh: memory, collectives and, with --device, the step's time",
    )
    p.add_argument("--no-compile", action="store_true", help="leave out the memory of the step")
    p.add_argument("--json", action="store_true", help="print JSON")
    _add_config(p)
    return parser


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, help="a run or one of its checkpoints [the newest run]"
    )


def _version() -> str:
    from mhcjax import __version__

    return f"mhcjax {__version__}"


# --------------------------------------------------------------------------------------------------
# The verbs


def _train(args: argparse.Namespace) -> int:
    from mhcjax import audit, cluster, loop, processes, runs

    cluster.join(args.coordinator, args.processes, args.process, heartbeat=args.heartbeat)
    try:
        overrides = _overrides(args)
        folder = args.run
        if folder is None:
            config = override(preset(args.preset or "nano"), overrides)
            folder = Path("runs") / audit.model_name(config)
            if processes.leads():
                print(f"run folder: {folder}")
        # By one of several processes: the others may see a folder that it has begun to fill.
        text = processes.agreed(
            lambda: to_json(
                runs.resolve(folder, overrides, preset_name=args.preset, resume=args.resume)
            )
        )
        outcome = loop.fit(
            from_json(text),
            folder,
            resume=args.resume,
            dry_run=args.dry_run,
            say=_say,
            command=command(),
        )
        cluster.leave()
        return outcome.exit_code
    except RuntimeError:  # JAX's, from a collective or a barrier
        cluster.verdict(args.heartbeat + 10)
        raise
    finally:
        cluster.leave(together=False)


def _say(line: str) -> None:
    print(line, flush=True)


def _load(path: Path | None) -> Any:
    from mhcjax import runlog, runs

    if path is None:
        path = runlog.newest_run()
        print(f"newest run: {path}", file=sys.stderr)
    return runs.load(path)


def _text(loaded: Any, rows: int) -> Any:
    """Held-out text of the corpus that the model was trained on, tokens[B, T + 1]."""
    from mhcjax import data, tokens

    c = loaded.config
    corpus = tokens.build(c.data.corpus, c.data.tokenizer, c.model.vocab)
    if corpus.sha256 != loaded.meta["corpus"]:
        print(
            f"note: {c.data.corpus!r} is not the text that this model was trained on "
            f"({corpus.sha256[:12]}, then {loaded.meta['corpus'][:12]})",
            file=sys.stderr,
        )
    held_out = data.open_tokens(corpus.validation, corpus.dtype)
    return next(data.validation_batches(held_out, batch=rows, length=c.data.length, count=1))


def _sample(args: argparse.Namespace) -> int:
    from mhcjax import sample

    loaded = _load(args.path)
    settings = sample.Settings(args.temperature, args.top_k, args.top_p, args.min_p)
    prompts = args.prompt or ["def __init__(self"]
    single = len(prompts) == 1 and not args.json

    def stream(row: int, piece: str) -> None:
        print(piece, end="", flush=True)

    if single:
        settings.check()
        print(prompts[0], end="", flush=True)
    made = sample.generate(
        loaded.graphdef,
        loaded.params,
        loaded.config.model,
        loaded.tokenizer(),
        prompts,
        tokens=args.tokens,
        settings=settings,
        seed=args.seed,
        stop=args.stop,
        on_text=stream if single else None,
    )
    if single:
        print()
    elif args.json:
        rows = [{"prompt": g.prompt, "text": g.text, "finish": g.finish} for g in made]
        print(json.dumps(rows, indent=2))
    else:
        for g in made:
            print(f"--- {g.prompt!r} ({g.finish})\n{g.prompt}{g.text}\n")
    return 0


def _diagnose(args: argparse.Namespace) -> int:
    import jax

    from mhcjax import audit, checkpoint, gpt

    loaded = _load(args.path)
    fresh = gpt.build(loaded.config.model, key=jax.random.key(loaded.config.seed))[1]
    prints = (
        loaded.meta["fingerprint"],
        checkpoint.fingerprint(loaded.params),
        checkpoint.fingerprint(fresh),
    )
    checks = audit.diagnose(
        loaded.graphdef, loaded.params, loaded.config, _text(loaded, 4), fingerprints=prints
    )
    failed = sum(c.status == "fail" for c in checks)
    if args.json:
        print(json.dumps([vars(c) for c in checks], indent=2))
    else:
        for c in checks:
            print(f"{c.status:<5} {c.name:<13} {c.text}")
        print(f"{loaded.path}: {len(checks) - failed} checks passed, {failed} failed")
    return 1 if failed else 0


def _inspect(args: argparse.Namespace) -> int:
    from mhcjax import audit

    loaded = _load(args.path)
    rows = audit.inspect(loaded.graphdef, loaded.params, loaded.config, _text(loaded, 2))
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{loaded.path}: {audit.model_name(loaded.config)}, step {loaded.meta['step']}")
    wide = len(rows[0]["pre"]) > 2
    table = [
        {
            "sublayer": r["sublayer"],
            **({"alpha": f"{r['alpha']:.3f}"} if "alpha" in r else {}),
            "pre": _row(r["pre"]),
            "post": _row(r["post"]),
            "res, row by row" if not wide else "diagonal of res": _row(r["res"][0])
            + "".join(" | " + _row(x) for x in r["res"][1:])
            if not wide
            else _row([r["res"][i][i] for i in range(len(r["res"]))]),
            "entropy": f"{r['entropy']:.3f}",
            "cos mixed": f"{r['cosine of what res mixes']:.3f}",
            "cos after": f"{r['cosine of the streams after']:.3f}",
            "dead by structure": " ".join(r["dead by structure"]),
        }
        for r in rows
    ]
    _table(table)
    return 0


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def _info(args: argparse.Namespace) -> int:
    from mhcjax import audit, costs, gpt, optim, plan, train

    config = override(preset(args.preset), _overrides(args))
    if args.mesh:
        config = override(config, costs.parse_mesh(args.mesh))
    if args.connection:
        # By itself: the init of the model's preset is not the connection's own.
        own = {"model.connection.preset": args.connection, "model.connection.init": None}
        config = override(config, {**own, **_overrides(args)})
        spec = gpt.connection_of(config.model)
        rows = audit.connection_info(spec, width=config.model.width, layers=2 * config.model.layers)
    elif args.mesh:
        rows = audit.info(config, device=args.device) | plan.info(config, device=args.device)
    elif args.no_compile:
        rows = audit.info(config, device=args.device)
    else:
        program = train.program(config)
        compiled = program.compile(optim.hyper(config.optim, config.total_steps))
        rows = audit.info(config, compiled=compiled, device=args.device)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    flat: list[tuple[str, str]] = []
    for name, value in rows.items():
        if isinstance(value, dict):
            flat.append((name, ""))
            flat += [(f"  {key}", _figure(n)) for key, n in value.items()]
        elif isinstance(value, list):
            flat += [(name if not k else "", line) for k, line in enumerate(value or ["none"])]
        else:
            flat.append((name, _figure(value)))
    wide = max(34, *(len(name) for name, _ in flat))
    for name, shown in flat:
        print(f"{name:<{wide}} {shown}".rstrip())
    return 0


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _table(rows: list[dict[str, str]]) -> None:
    """Columns as wide as they need to be, on the terminal and in a file alike."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row.values())
    Console(width=max(shutil.get_terminal_size().columns, 160), highlight=False).print(table)


VERBS = {
    "train": _train,
    "sample": _sample,
    "diagnose": _diagnose,
    "inspect": _inspect,
    "info": _info,
}


def _ours(error: ValueError) -> bool:
    """Was it raised by this package? Then it is bad input, said in one sentence that names the
    value and the fix. One from inside JAX is a defect and keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return (
        frame is not None
        and Path(__file__).parent in Path(frame.tb_frame.f_code.co_filename).parents
    )


def use_compilation_cache() -> None:
    """JAX's persistent compilation cache beside the token shards, unless the user has set one."""
    import jax

    from mhcjax import tokens

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(tokens.cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; -> the exit code."""
    args = _parser().parse_args(argv)
    try:
        use_compilation_cache()
        code = VERBS[args.verb](args)
        sys.stdout.flush()  # here, where a closed pipe is caught
        return code
    except ValueError as error:
        if not _ours(error):
            raise
        print(f"mhcjax {args.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
