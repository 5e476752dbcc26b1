"""The two write rules are reparametrisations of each other: mixes and parameters under the other.

Axis key: N source stream, M destination stream. Leading axes are those of a stack of sublayers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mhcjax.coefficients import Dynamic, Fixed, Params, check_choice
from mhcjax.connections import Mix, fold_post, mix
from mhcjax.spec import RULES, Connection, Rule

__all__ = ["convert_params", "convert_rule"]


def convert_rule(mix: Mix, *, to: Rule) -> Mix:
    """The same write under the other rule: only `post` changes.

    to "mix_first": `post' = res @ post`, always. to "add_first": `post' = res^-1 @ post`, where res
    is invertible; concrete arrays only, so that a singular one is a ValueError that names it.

    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> m = Mix(pre=jnp.ones(2), post=jnp.array([1.0, 0.0]), res=swap)
    >>> convert_rule(m, to="mix_first").post.tolist()
    [0.0, 1.0]
    """
    check_choice("to", to, RULES)
    if to == "mix_first":
        return Mix(mix.pre, fold_post(mix), mix.res)
    res = np.asarray(mix.res, np.float64)
    post = np.broadcast_to(np.asarray(mix.post, np.float64), res.shape[:-1])
    limit = res.shape[-1] * np.finfo(np.asarray(mix.res).dtype).eps
    singular = np.linalg.svd(res, compute_uv=False)
    bad = np.argwhere(singular[..., -1] <= limit * singular[..., 0])
    if len(bad):
        raise ValueError(
            f"{_sublayer(bad[0])}res is singular, so no post under add_first gives this write: "
            "keep mix_first"
        )
    solved = np.linalg.solve(res, post[..., None])[..., 0]
    return Mix(mix.pre, jnp.asarray(solved, mix.post.dtype), mix.res)


def convert_params(spec: Connection, params: Params, *, to: Rule) -> tuple[Connection, Params]:
    """(spec, params) with the same outputs under the other rule; static mixes, stacked or not.

    `post_logits' = logit(post' / post_scale)`, with post' from `convert_rule`; `post' / post_scale`
    where post is linear. Raises ValueError, naming the sublayer, where post' is not inside
    (0, post_scale) or res is singular, and for dynamic mixes, whose post is made per token.

    >>> from mhcjax.spec import init
    >>> spec = Connection()
    >>> convert_params(spec, init(spec, width=8), to="mix_first")[0].rule
    'mix_first'
    """
    check_choice("to", to, RULES)
    if spec.rule == to or isinstance(spec.coefficients, Fixed):
        return replace(spec, rule=to), params
    if isinstance(spec.coefficients, Dynamic) or spec.post not in ("sigmoid", "linear"):
        raise ValueError(
            f"post of {spec!r} is no free parameter, so no parameters give this write under {to}: "
            "convert the mix of each token with convert_rule"
        )
    stacked = params["pre_logits"].ndim > 1
    x = jnp.zeros((spec.streams, 1), jnp.float32)
    mixes = partial(mix, spec)
    m = (jax.vmap(mixes, in_axes=(0, None)) if stacked else mixes)(params, x)
    share = np.asarray(convert_rule(m, to=to).post, np.float64) / spec.post_scale
    if spec.post == "linear":
        return replace(spec, rule=to), {
            **params,
            "post_logits": jnp.asarray(share, params["post_logits"].dtype),
        }
    bad = np.argwhere((share <= 0) | (share >= 1))
    if len(bad):
        raise ValueError(
            f"{_sublayer(bad[0][:-1])}post of stream {bad[0][-1]} would be "
            f"{share[tuple(bad[0])] * spec.post_scale:.4g}, outside (0, {spec.post_scale:g}): "
            f"no post logit under {to} gives this write"
        )
    logits = jnp.asarray(np.log(share) - np.log1p(-share), params["post_logits"].dtype)
    return replace(spec, rule=to), {**params, "post_logits": logits}


def _sublayer(index: np.ndarray) -> str:
    return f"sublayer {', '.join(map(str, index))}: " if len(index) else ""
