"""The oracle of one layer and all of its gradients, NumPy float64, over many tokens at once.

The forward pass is that of `oracle` and `oracle_presets` (tests/test_kernels.py holds it to them),
here with the chain rule written out by hand: every function returns what it computes and `pull`,
which takes the cotangents of that to the cotangents of its arguments. Shares no code with the
library.

Axis key: T token, N source stream, M destination stream, D width, E = N*D flattened, C coefficient
column [pre | post | res], J mixing logits, P permutation. Coefficients that all tokens share have
one token, T = 1.
"""

import itertools

import numpy as np

from tests.oracle_manifolds import prime_factors


def sigmoid(logits):
    """1 / (1 + exp(-l)), by the half that does not overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)


def softmax(logits, axis):
    """exp(l) / sum exp(l), and its pull."""
    weights = np.exp(logits - logits.max(axis=axis, keepdims=True))
    weights /= weights.sum(axis=axis, keepdims=True)
    return weights, lambda d: weights * (d - (d * weights).sum(axis=axis, keepdims=True))


# --------------------------------------------------------------------------------------------------
# Manifolds: logits[T, J] -> res[T, M, N]


def identity(logits, streams):
    """I."""
    res = np.broadcast_to(np.eye(streams), (len(logits), streams, streams))
    return res, lambda d: np.zeros_like(logits)


def unconstrained(logits, streams):
    """The logits, row by row."""
    return logits.reshape(-1, streams, streams), lambda d: d.reshape(logits.shape)


def permutations(logits, streams):
    """sum_k softmax(l)_k P_k, with a 1 of P_k in row m, column perm_k[m]."""
    perms = list(itertools.permutations(range(streams)))
    masks_PMN = np.zeros((len(perms), streams, streams))
    for k, perm in enumerate(perms):
        masks_PMN[k, range(streams), perm] = 1
    weights, pull = softmax(logits, -1)
    res = np.einsum("tp,pmn->tmn", weights, masks_PMN)
    return res, lambda d: pull(np.einsum("tmn,pmn->tp", d, masks_PMN))


def kronecker(logits, streams):
    """U_1 kron U_2 kron ..., each U_i of `permutations` of a prime factor of the streams."""
    res, steps, start = np.ones((len(logits), 1, 1)), [], 0
    for size in prime_factors(streams):
        count = len(list(itertools.permutations(range(size))))
        factor, pull = permutations(logits[:, start : start + count], size)
        steps.append((res, factor, pull))
        side, start = res.shape[-1] * size, start + count
        res = np.einsum("tab,tcd->tacbd", res, factor).reshape(-1, side, side)

    def pull_all(d):
        found = []
        for before, factor, pull in reversed(steps):
            a, c = before.shape[-1], factor.shape[-1]
            d = d.reshape(-1, a, c, a, c)
            found.append(pull(np.einsum("tacbd,tab->tcd", d, before)))
            d = np.einsum("tacbd,tcd->tab", d, factor)
        return np.concatenate(found[::-1], axis=-1)

    return res, pull_all


def sinkhorn(logits, streams, *, last, eps=0.0, iterations=20):
    """Softmax over the first axis, + eps; / (sum over the last + eps); then the other pairs.

    With eps = 0 the softmax is exp and the first normalisation.
    """
    last = {"rows": -1, "columns": -2}[last]  # the rows' sums are those over the last axis
    first = -3 - last
    res, pull = softmax(logits.reshape(-1, streams, streams), first)
    res, steps = res + eps, []
    for axis in [last, *[first, last] * (iterations - 1)]:
        total = res.sum(axis=axis, keepdims=True) + eps
        res = res / total
        steps.append((axis, total, res))

    def pull_all(d):
        for axis, total, after in reversed(steps):
            d = (d - (d * after).sum(axis=axis, keepdims=True)) / total
        return pull(d).reshape(logits.shape)

    return res, pull_all


def transposed(manifold, **options):
    """The manifold's matrix, source first."""

    def matrix(logits, streams):
        res, pull = manifold(logits, streams, **options)
        return res.swapaxes(-1, -2), lambda d: pull(d.swapaxes(-1, -2))

    return matrix


# --------------------------------------------------------------------------------------------------
# Coefficients


def inside(square, eps, inputs):
    """(mean(x^2) + eps)^-1/2 and its derivative."""
    factor = (square + eps) ** -0.5
    return factor, -(factor**3) / 2


def outside(square, eps, inputs):
    """1 / (sqrt(mean(x^2)) + eps) and its derivative."""
    factor = 1 / (np.sqrt(square) + eps)
    return factor, -(factor**2) / (2 * np.sqrt(square))


def clamped(square, eps, inputs):
    """sqrt(E) / max(|x|, eps) and its derivative, where |x| > eps."""
    assert (square * inputs > eps**2).all()
    return outside(square, 0.0, inputs)


DEEPSEEK = transposed(sinkhorn, last="columns", eps=1e-6)

# What `oracle_presets` says of each: norm and its eps, matrix, eps added to pre.
DYNAMIC = {
    "mhc": (inside, 1e-20, lambda l, n: sinkhorn(l, n, last="rows"), 0.0),
    "deepseek_v4": (inside, 1e-6, DEEPSEEK, 1e-6),
    "single_pass": (inside, 1e-6, DEEPSEEK, 1e-6),
    "megatron": (outside, 1e-6, DEEPSEEK, 1e-6),
    "maxtext": (inside, 1e-5, DEEPSEEK, 1e-6),
    "mhc_lite": (clamped, 1e-12, transposed(permutations), 0.0),
    # Published for pairs, whose matrix is symmetric; with a factor of 3 its rows are destinations.
    "kromhc": (clamped, 1e-12, kronecker, 0.0),
    "ihc": (inside, 1e-20, identity, 0.0),
}


def maps(matrix, pre_eps, pre, post, res, streams):
    """(sigmoid(pre) + pre_eps, 2 sigmoid(post), matrix(res)) and the pull to the three logits."""
    shares = sigmoid(pre), sigmoid(post)
    made, pull = matrix(res, streams)

    def pull_all(d_pre, d_post, d_res):
        a, b = shares
        return d_pre * a * (1 - a), 2 * d_post * b * (1 - b), pull(d_res)

    return (shares[0] + pre_eps, 2 * shares[1], made), pull_all


def static_mix(params, streams):
    """The mix of `mhc_n2` and `mhc_n4`: permutations of parameters alone."""
    l = {name: np.asarray(a, np.float64) for name, a in params.items()}
    if "alpha_logit" in l:
        l["res_logits"] = np.array([l["alpha_logit"], 0.0])
    names = ("pre_logits", "post_logits", "res_logits")
    found, pull = maps(permutations, 0.0, *(l[name][None] for name in names), streams)

    def pull_all(*d):
        own = dict(zip(names, (g[0] for g in pull(*d)), strict=True))
        if "alpha_logit" in l:
            own["alpha_logit"] = own.pop("res_logits")[0]
        return own

    return found, pull_all


def dynamic_mix(name, params, x_TND):
    """The mix of a preset in DYNAMIC; the pull gives (dx, gradients, sums of absolute terms)."""
    norm, eps, matrix, pre_eps = DYNAMIC[name]
    p = {key: np.asarray(a, np.float64) for key, a in params.items()}
    T, N, D = x_TND.shape
    x_TE = x_TND.reshape(T, N * D)
    gain = p.get("gain", np.ones(N * D))[:, None]
    names = [key for key in ("pre_logits", "post_logits", "res_logits") if key in p]
    ends = np.cumsum([len(p[key]) for key in names])
    groups = np.repeat(np.arange(len(names)), [len(p[key]) for key in names])
    scale_C = p["scale"][groups]

    square = (x_TE**2).mean(axis=1, keepdims=True)
    factor, slope = norm(square, eps, N * D)
    bare = x_TE @ (gain * p["projection"])
    logits = factor * bare * scale_C + np.concatenate([p[key] for key in names])
    split = np.split(logits, ends[:-1], axis=1)
    split += [np.zeros((T, 0))] * (3 - len(names))
    found, pull = maps(matrix, pre_eps, *split, N)

    def pull_all(*d):
        d_logits = np.concatenate(pull(*d), axis=1)
        own = dict(zip(names, np.split(d_logits.sum(axis=0), ends[:-1]), strict=True))
        terms = dict(zip(names, np.split(abs(d_logits).sum(axis=0), ends[:-1]), strict=True))
        by_column = d_logits * factor * bare
        for found, a in ((own, by_column), (terms, abs(by_column))):
            found["scale"] = np.array([a[:, groups == g].sum() for g in range(len(p["scale"]))])
        d_bare = d_logits * factor * scale_C
        raw = x_TE.T @ d_bare
        own["projection"] = gain * raw
        if "gain" in p:
            own["gain"] = (p["projection"] * raw).sum(axis=1)
        d_square = (d_logits * scale_C * bare).sum(axis=1, keepdims=True) * slope
        dx = d_bare @ (gain * p["projection"]).T + d_square * 2 * x_TE / (N * D)
        return dx.reshape(T, N, D), own, terms

    return found, pull_all


# --------------------------------------------------------------------------------------------------
# Read and write


def read(x, pre):
    """u = sum_n pre[n] x[n]; the pull gives (dx, dpre of each token)."""
    u = np.einsum("tn,tnd->td", np.broadcast_to(pre, x.shape[:2]), x)

    def pull(du):
        return pre[..., None] * du[:, None], np.einsum("td,tnd->tn", du, x)

    return u, pull


def write(x, y, post, res, rule):
    """res @ (x + post y) or res @ x + post y; the pull gives (dx, dy, each token's dpost and dres).

    A matrix that all tokens share, and one each, are the same here.
    """
    T, N, _ = x.shape
    res, post = np.broadcast_to(res, (T, N, N)), np.broadcast_to(post, (T, N))
    added = post[..., None] * y[:, None]
    mixed = x + added if rule == "add_first" else x
    out = res @ mixed + (0 if rule == "add_first" else added)

    def pull(d):
        d_mixed = res.swapaxes(-1, -2) @ d
        d_added = d_mixed if rule == "add_first" else d
        dy = np.einsum("tn,tnd->td", post, d_added)
        dpost = np.einsum("tnd,td->tn", d_added, y)
        return d_mixed, dy, dpost, d @ mixed.swapaxes(-1, -2)

    return out, pull


def pulled(d, like):
    """(cotangent, sums of absolute terms) of coefficients: each token's own, or those of all."""
    if len(like) == len(d):
        return d, d
    return d.sum(axis=0, keepdims=True), abs(d).sum(axis=0, keepdims=True)


# --------------------------------------------------------------------------------------------------
# One layer around the branch f(u) = u + y


def layer(name, params, x, y, d, rule="mix_first"):
    """read, u + y, write of x[T, N, D], y[T, D] for the cotangent d[T, N, D] of the streams.

    -> (streams, gradients by name, sums of absolute terms of the small ones). `name` is a preset in
    DYNAMIC, or "static". For "single_pass" the branch reads the first stream, and the output and d
    are pairs: streams, and the next sublayer's u.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    carried = name == "single_pass"
    if name == "static":
        (pre, post, res), pull_mix = static_mix(params, x.shape[1])
    else:
        (pre, post, res), pull_mix = dynamic_mix(name, params, x)
    u, pull_read = (x[:, 0], None) if carried else read(x, pre)
    out, pull_write = write(x, u + y, post, res, rule)

    if carried:
        u_next, pull_next = read(out, pre)
        d, du_next = d
        d_more, d_pre = pull_next(np.asarray(du_next, np.float64))
        d = d + d_more
    dx, dy, d_post, d_res = pull_write(np.asarray(d, np.float64))
    if carried:
        dx[:, 0] += dy
    else:
        d_more, d_pre = pull_read(dy)
        dx = dx + d_more

    if name == "static":
        own, terms = _shared(pull_mix, (pre, post, res), (d_pre, d_post, d_res))
    else:
        d_more, own, terms = pull_mix(d_pre, d_post, d_res)
        dx = dx + d_more
    outputs = (out, u_next) if carried else (out,)
    return outputs, {"x": dx, "y": dy, **own}, terms


def _shared(pull_mix, mix, d):
    """Gradients of a static mix's logits, and the sums over tokens of their absolute terms."""
    sums = [pulled(g, like)[0] for g, like in zip(d, mix, strict=True)]
    each = [pull_mix(*(g[t : t + 1] for g in d)) for t in range(len(d[0]))]
    return pull_mix(*sums), {key: sum(abs(own[key]) for own in each) for key in each[0]}
