"""The pictures of a run: loss, and what the streams do. Matplotlib is imported where it draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhcjax.connections import Mix

__all__ = ["loss_figure", "mixing_figure"]

_INK = {"train": "#8da0b3", "val": "#b3261e"}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    # The object interface: no global state, no window, works in a notebook and on a server.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def loss_figure(runs: dict[str, list[dict]]) -> Any:
    """Training cross-entropy and validation bits per byte; `runs` maps a name to its metric rows.

    >>> loss_figure({"a": [{"kind": "train", "step": 1, "ce": 8.3}]})  # doctest: +ELLIPSIS
    <Figure ...>
    """
    figure, (left, right) = _figure(1, 2, 10, 3.6)
    single = len(runs) == 1
    for name, rows in runs.items():
        train = [r for r in rows if r["kind"] == "train" and r["ce"] is not None]
        val = [r for r in rows if r["kind"] == "eval" and r["val_bpb"] is not None]
        left.plot(
            [r["step"] for r in train],
            [r["ce"] for r in train],
            color=_INK["train"] if single else None,
            label="training batches" if single else name,
        )
        steps, bpb = [r["step"] for r in val], [r["val_bpb"] for r in val]
        if single:
            left.plot(
                steps, [r["val_ce"] for r in val], "o-", color=_INK["val"], label="validation"
            )
        last = f"{name}  {bpb[-1]:.3f}" if val else name
        right.plot(steps, bpb, "o-", color=_INK["val"] if single else None, label=last)
    left.set(xlabel="update", ylabel="nats per token", title="cross-entropy")
    right.set(xlabel="update", ylabel="bits per byte", title="validation, with the last value")
    for axes in (left, right):
        values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        # Runs that start far off would press all others flat on the ground.
        if values.size and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize="small")
    return figure


def mixing_figure(mixes: list[Mix], cosines: list[float], history: list[dict] | None = None) -> Any:
    """Per sublayer: pre, post, the diagonal of res, and the cosine of what res mixes.

    `history` (rows of kind "eval") adds how the cosine moved during training.

    >>> import jax.numpy as jnp
    >>> one = Mix(jnp.ones(2), jnp.ones(2), jnp.eye(2))
    >>> mixing_figure([one] * 4, [0.5] * 4)  # doctest: +ELLIPSIS
    <Figure ...>
    """
    figure, (ax_pre, ax_post, ax_res, ax_cos) = _figure(2, 2, 10, 6.4)
    depth = np.arange(len(mixes))
    streams = np.asarray(mixes[0].pre).shape[-1]

    def mean(array: Any, rank: int) -> np.ndarray:
        wide = np.asarray(array, np.float64)
        return wide.reshape(-1, *wide.shape[wide.ndim - rank :]).mean(0)

    diagonal = np.stack([np.diagonal(mean(m.res, 2)) for m in mixes])
    pre = np.stack([mean(m.pre, 1) for m in mixes])
    post = np.stack([mean(m.post, 1) for m in mixes])
    for n in range(streams):
        ax_pre.plot(depth, pre[:, n], ".-", label=f"stream {n}")
        ax_post.plot(depth, post[:, n], ".-")
        # Wide to narrow, so that equal lines stay visible.
        ax_res.plot(depth, diagonal[:, n], ".-", lw=1 + 2 * (streams - 1 - n))
    ax_pre.set(title="pre: what each sublayer reads", ylim=(0, None))
    ax_pre.legend(frameon=False, fontsize="small")
    ax_post.set(title="post: where it writes", ylim=(0, None))
    ax_res.axhline(1 / streams, color="gray", ls=":", lw=1)
    ax_res.annotate("1 / N: full mixing", (0, 1 / streams), fontsize=8, color="gray", va="bottom")
    ax_res.set(title="diagonal of res: how much each stream keeps")
    ax_res.set_ylim(min(0.0, float(diagonal.min())), 1.05)
    rows = [r for r in history or [] if r.get("cosine_operand")]
    for i, row in enumerate(rows[:-1]):
        ax_cos.plot(
            depth,
            row["cosine_operand"],
            color="gray",
            alpha=0.25 + 0.6 * i / len(rows),
            lw=1,
            label=f"update {row['step']}" if i in (0, len(rows) - 2) else None,
        )
    now = f"update {rows[-1]['step']}" if rows else "now"
    ax_cos.plot(depth, cosines, ".-", color=_INK["val"], label=now)
    ax_cos.axhline(1.0, color="gray", ls=":", lw=1)
    ax_cos.set(title="cosine between the streams that res mixes (1 is dead)")
    ax_cos.legend(frameon=False, fontsize="small")
    for ax in (ax_res, ax_cos):
        ax.set_xlabel("sublayer (even: attention, odd: MLP)")
    return figure
