"""Presets: named points of the family of connections. Each states its source and its inits.

The mission's own are here, the published ones in `published`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from mhcjax.coefficients import Fixed, Init, Static
from mhcjax.published import (
    KEEP,
    cmhc,
    deepseek_v4,
    go_mhc,
    hc,
    hc_static,
    ihc,
    jpmhc,
    kromhc,
    liger,
    lucidrains_mhc,
    maxtext,
    megatron,
    mhc,
    mhc_lite,
    ohc,
    shc,
    single_pass,
    tbp,
)
from mhcjax.spec import Connection

__all__ = [
    "PRESETS",
    "cmhc",
    "deepseek_v4",
    "go_mhc",
    "hc",
    "hc_static",
    "ihc",
    "jpmhc",
    "kromhc",
    "liger",
    "lucidrains_mhc",
    "maxtext",
    "megatron",
    "mhc",
    "mhc_lite",
    "mhc_n2",
    "mhc_n4",
    "named",
    "ohc",
    "residual",
    "shc",
    "single_pass",
    "takes",
    "tbp",
]

NamedInit = Literal["balanced", "near_identity", "depth", "symmetric"]


def residual() -> Connection:
    """The plain pre-norm residual `x + f(norm(x))`: one stream, no parameters. The baseline.

    >>> residual().streams
    1
    """
    return Connection(streams=1, manifold="identity", coefficients=Fixed())


def mhc_n2(init: NamedInit = "balanced", *, alpha_logit: float | None = None) -> Connection:
    """Two streams, `alpha = sigmoid(alpha_logit)`, `res = [[alpha, 1-alpha], [1-alpha, alpha]]`.

    nanochat-rs, mhc-lite N2; static; write rule add_first; mean exit. `init`:

    - "balanced": alpha_logit 0; pre and post logits +1 at the favourite stream, -1 elsewhere. Both
      rows of res are equal, so every write equates the streams until alpha has moved: alpha learns,
      pre hardly does at first.
    - "near_identity": alpha_logit 2, the rest as balanced. Streams stay apart; start with this one.
    - "depth": alpha_logit such that half of the streams' difference outlives all sublayers.
    - "symmetric": alpha_logit 0, every pre and post logit 0.5. The Rust project's: equal streams
      stay equal, the gradient of alpha is exactly 0, the model is a plain residual. Warns.

    `alpha_logit` overrides the init's.

    >>> mhc_n2("near_identity").coefficients.init.res
    (2.0, 0.0)
    """
    res = {"near_identity": 2.0}.get(init, 0.0)
    spec = _mhc(2, init, (res if alpha_logit is None else alpha_logit, 0.0))
    if alpha_logit is not None and init == "depth":
        raise ValueError(f"alpha_logit {alpha_logit} and init 'depth' both set alpha: give one")
    return spec


def mhc_n4(init: NamedInit = "balanced") -> Connection:
    """Four streams, `res = sum_k softmax(res_logits)_k P_k` over the 24 permutations.

    mHC-lite (arXiv 2601.05732) without its dynamic part; static; add_first; mean exit. `init`:

    - "balanced": 24 equal logits, so res is uniform and every write equates the streams at first.
    - "near_identity": identity logit 0, the rest -8: the diagonal of res is 0.994.
    - "depth": the identity's logit such that half of the streams' difference outlives the depth.
    - "symmetric": as balanced, with every pre and post logit 0.5: a plain residual. Warns.

    >>> mhc_n4().num_logits
    24
    """
    return _mhc(4, init, (0.0, -8.0 if init == "near_identity" else 0.0))


def _mhc(streams: int, init: str, res: tuple[float, float]) -> Connection:
    inits = {
        "balanced": Init(res=res),
        "near_identity": Init(res=res),
        "depth": Init(keep=KEEP),
        "symmetric": Init(res=res, pre=(0.5, 0.5), post=(0.5, 0.5)),
    }
    if init not in inits:
        raise ValueError(f"unknown init {init!r}: choose one of {', '.join(inits)}")
    if init == "symmetric":
        warnings.warn(
            "the symmetric init keeps the streams equal: res never gets a gradient and the model "
            "is a plain residual; use near_identity or balanced",
            stacklevel=3,
        )
    return Connection(streams=streams, coefficients=Static(inits[init]))


PRESETS: Mapping[str, Callable[..., Connection]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            residual,
            mhc_n2,
            mhc_n4,
            hc,
            hc_static,
            ihc,
            mhc,
            deepseek_v4,
            single_pass,
            megatron,
            maxtext,
            liger,
            lucidrains_mhc,
            mhc_lite,
            kromhc,
            go_mhc,
            ohc,
            jpmhc,
            shc,
            tbp,
            cmhc,
        )
    }
)


def named(name: str, **options: Any) -> Connection:
    """The preset of that name; options are its own arguments or fields of `Connection`.

    >>> named("mhc_n2", init="near_identity", rule="mix_first").rule
    'mix_first'

    Raises ValueError for a name or an option that does not exist.
    """
    own = takes(name)
    replaced = {k: v for k, v in options.items() if k not in own}
    spec = PRESETS[name](**{k: v for k, v in options.items() if k in own})
    for option in replaced:
        if option not in Connection.__dataclass_fields__:
            raise ValueError(
                f"connection {name!r} has no option {option!r}: it takes "
                f"{', '.join(dict.fromkeys([*own, *Connection.__dataclass_fields__]))}"
            )
    return replace(spec, **replaced)


def takes(name: str) -> tuple[str, ...]:
    """The arguments of the preset of that name.

    >>> takes("mhc")
    ('init', 'streams')
    """
    if name not in PRESETS:
        raise ValueError(f"unknown connection {name!r}: choose one of {', '.join(PRESETS)}")
    return tuple(inspect.signature(PRESETS[name]).parameters)
