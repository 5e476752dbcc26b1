"""The pictures of a run: loss, and what the streams do. Matplotlib is imported where it draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhcjax.connections import Mix

__all__ = ["loss_figure", "mixing_figure"]

_INK = {"train": "#8da0b3", "val": "#b3261e", "attention": "#1f5fa8", "mlp": "#c7741b"}


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    # The object interface: no global state, no window, works in a notebook and on a server.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def loss_figure(runs: dict[str, list[dict]]) -> Any:
    """Training cross-entropy and validation bits per byte; `runs` maps a name to its metric rows.

    >>> loss_figure({"a": [{"kind": "train", "step": 1, "ce": 8.3}]})  # doctest: +ELLIPSIS
    <Figure ...>
    """
    figure, (left, right) = _figure(2, 10, 3.6)
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
        right.plot(steps, bpb, "o-", color=_INK["val"] if single else None, label=name)
        if val:
            right.annotate(
                f"{bpb[-1]:.3f}",
                (steps[-1], bpb[-1]),
                xytext=(-4, 8),
                textcoords="offset points",
                ha="right",
            )
    left.set(xlabel="update", ylabel="nats per token", title="cross-entropy")
    right.set(xlabel="update", ylabel="bits per byte", title="validation")
    left.legend(frameon=False)
    return figure


def mixing_figure(mixes: list[Mix], cosines: list[float], history: list[dict] | None = None) -> Any:
    """Per sublayer: pre, post, the diagonal of res, and the cosine of what res mixes.

    `history` (rows of kind "eval") adds how the cosine moved during training.

    >>> import jax.numpy as jnp
    >>> one = Mix(jnp.ones(2), jnp.ones(2), jnp.eye(2))
    >>> mixing_figure([one] * 4, [0.5] * 4)  # doctest: +ELLIPSIS
    <Figure ...>
    """
    figure, (ax_pre, ax_post, ax_res, ax_cos) = _figure(4, 14, 3.6)
    depth = np.arange(len(mixes))
    streams = np.asarray(mixes[0].pre).shape[-1]

    def mean(array: Any, rank: int) -> np.ndarray:
        wide = np.asarray(array, np.float64)
        return wide.reshape(-1, *wide.shape[wide.ndim - rank :]).mean(0)

    for ax, name in ((ax_pre, "pre"), (ax_post, "post")):
        values = np.stack([mean(getattr(m, name), 1) for m in mixes])
        for n in range(streams):
            ax.plot(depth, values[:, n], ".-", label=f"stream {n}")
        ax.set(title=name, xlabel="sublayer (even: attention, odd: MLP)", ylim=(0, None))
    ax_pre.legend(frameon=False, fontsize="small")
    diagonal = np.stack([np.diagonal(mean(m.res, 2)) for m in mixes])
    for n in range(streams):
        ax_res.plot(depth, diagonal[:, n], ".-", label=f"stream {n}")
    ax_res.axhline(1 / streams, color="gray", ls=":", lw=1)
    ax_res.annotate("full mixing", (0, 1 / streams), fontsize=8, color="gray", va="bottom")
    ax_res.set(title="diagonal of res (1 keeps, dotted mixes fully)", xlabel="sublayer")
    ax_res.set_ylim(min(0.0, float(diagonal.min())), 1.05)
    rows = [r for r in history or [] if r.get("cosine_operand")]
    for i, row in enumerate(rows[:-1]):
        ax_cos.plot(
            depth,
            row["cosine_operand"],
            color="gray",
            alpha=0.2 + 0.5 * i / len(rows),
            lw=1,
            label=f"update {row['step']}",
        )
    ax_cos.plot(depth, cosines, ".-", color=_INK["val"], label="now")
    ax_cos.axhline(1.0, color="gray", ls=":", lw=1)
    ax_cos.set(title="cosine of what res mixes (1 is dead)", xlabel="sublayer")
    ax_cos.legend(frameon=False, fontsize="small")
    return figure
