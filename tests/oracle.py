"""The oracle: every formula once more, in NumPy float64, by loops. Shares no code with the library.

Gradients are the chain rule written out by hand; `tests/test_connections.py` checks them against
central differences of the forward pass, so that the oracle itself is held by something.

Axis key: N source stream, M destination stream, D width, J mixing logits, P permutation. `...`
stands for leading axes: tokens, or a stack of sublayers.
"""

import itertools

import numpy as np


def sigmoid(logits):
    """1 / (1 + exp(-l)), by the half that does not overflow."""
    logits = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def softmax(logits):
    """Over the last axis."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# --------------------------------------------------------------------------------------------------
# Manifolds: logits[..., J] -> res[..., M, N]


def permutations(logits, streams):
    """sum_k softmax(logits)_k P_k; row m of P_k has its 1 in column perm_k[m]."""
    weights = softmax(logits)
    res = np.zeros((*weights.shape[:-1], streams, streams))
    for k, perm in enumerate(itertools.permutations(range(streams))):
        for m in range(streams):
            res[..., m, perm[m]] += weights[..., k]
    return res


def identity(logits, streams):
    """I, whatever the leading axes."""
    res = np.zeros((*np.shape(logits)[:-1], streams, streams))
    for m in range(streams):
        res[..., m, m] = 1
    return res


def unconstrained(logits, streams):
    """The logits, row by row."""
    logits = np.asarray(logits, np.float64)
    res = np.zeros((*logits.shape[:-1], streams, streams))
    for m in range(streams):
        for n in range(streams):
            res[..., m, n] = logits[..., m * streams + n]
    return res


MATRICES = {"permutations": permutations, "identity": identity, "unconstrained": unconstrained}


def matrix_gradient(manifold, logits, streams, d_res):
    """d loss / d logits[J] from d loss / d res[M, N]."""
    if manifold == "permutations":
        weights = softmax(logits)
        d_weights = np.zeros_like(weights)
        for k, perm in enumerate(itertools.permutations(range(streams))):
            for m in range(streams):
                d_weights[k] += d_res[m, perm[m]]
        return weights * (d_weights - (weights * d_weights).sum())
    if manifold == "unconstrained":
        return np.array([d_res[m, n] for m in range(streams) for n in range(streams)])
    return np.zeros(0)


# --------------------------------------------------------------------------------------------------
# Coefficients, read, write, ends


def res_logits(params):
    """The logits of res; one alpha_logit stands for [alpha_logit, 0]."""
    if "alpha_logit" in params:
        alpha_logit = np.asarray(params["alpha_logit"], np.float64)
        return np.stack([alpha_logit, np.zeros_like(alpha_logit)], axis=-1)
    return np.asarray(params.get("res_logits", np.zeros(0)), np.float64)


def mix(params, *, manifold="permutations", streams, post_scale=2.0):
    """(pre[..., N], post[..., N], res[..., M, N]) of a static mix, or of a stack of them."""
    pre = sigmoid(params["pre_logits"])
    post = post_scale * sigmoid(params["post_logits"])
    return pre, post, MATRICES[manifold](res_logits(params), streams)


def read(x, pre):
    """u = sum_n pre[n] x[n]."""
    x, pre = np.asarray(x, np.float64), np.asarray(pre, np.float64)
    return sum(pre[..., n, None] * x[..., n, :] for n in range(x.shape[-2]))


def write(x, y, post, res, rule):
    """add_first: res @ (x + post * y). mix_first: res @ x + post * y."""
    x, y, post, res = (np.asarray(a, np.float64) for a in (x, y, post, res))
    streams = range(x.shape[-2])
    if rule == "add_first":
        z = [x[..., n, :] + post[..., n, None] * y for n in streams]
        rows = [sum(res[..., m, n, None] * z[n] for n in streams) for m in streams]
    else:
        rows = [
            sum(res[..., m, n, None] * x[..., n, :] for n in streams) + post[..., m, None] * y
            for m in streams
        ]
    return np.stack(rows, axis=-2)


def expand(u, streams):
    """Every stream starts as u."""
    return np.stack([np.asarray(u, np.float64)] * streams, axis=-2)


def collapse(x, how):
    """The mean or the sum of the streams."""
    x = np.asarray(x, np.float64)
    total = sum(x[..., n, :] for n in range(x.shape[-2]))
    return total / x.shape[-2] if how == "mean" else total


# --------------------------------------------------------------------------------------------------
# One sublayer around f(u) = tanh(u @ weights), and its gradients


def connect(params, weights, x, *, rule, manifold="permutations", streams, post_scale=2.0):
    """read, tanh(u @ weights), write."""
    pre, post, res = mix(params, manifold=manifold, streams=streams, post_scale=post_scale)
    y = np.tanh(read(x, pre) @ np.asarray(weights, np.float64))
    return write(x, y, post, res, rule)


def connect_gradients(
    params, weights, x, cotangent, *, rule, manifold="permutations", streams, post_scale=2.0
):
    """The gradients of loss = sum(cotangent * connect(...)), by the chain rule.

    A dict with the names of `params`, "weights" and "x", and "res": d loss / d res, which is the
    scale that errors of logit gradients are measured against.
    """
    x, weights, cotangent = (np.asarray(a, np.float64) for a in (x, weights, cotangent))
    width = x.shape[-1]
    x_TND, g_TMD = x.reshape(-1, streams, width), cotangent.reshape(-1, streams, width)
    pre, post, res = mix(params, manifold=manifold, streams=streams, post_scale=post_scale)
    u_TD = read(x_TND, pre)
    y_TD = np.tanh(u_TD @ weights)

    d_res, d_post, d_pre = np.zeros((streams, streams)), np.zeros(streams), np.zeros(streams)
    d_x, d_y = np.zeros_like(x_TND), np.zeros_like(y_TD)
    for n in range(streams):
        d_mixed = sum(res[m, n] * g_TMD[:, m] for m in range(streams))
        d_x[:, n] += d_mixed
        for m in range(streams):
            mixed = x_TND[:, n] + post[n] * y_TD if rule == "add_first" else x_TND[:, n]
            d_res[m, n] = (g_TMD[:, m] * mixed).sum()
        d_written = d_mixed if rule == "add_first" else g_TMD[:, n]
        d_post[n] = (d_written * y_TD).sum()
        d_y += post[n] * d_written
    d_h = d_y * (1 - y_TD**2)
    d_u = d_h @ weights.T
    for n in range(streams):
        d_pre[n] = (d_u * x_TND[:, n]).sum()
        d_x[:, n] += pre[n] * d_u

    share = post / post_scale
    gradients = {
        "pre_logits": d_pre * pre * (1 - pre),
        "post_logits": d_post * post_scale * share * (1 - share),
        "weights": u_TD.T @ d_h,
        "x": d_x.reshape(x.shape),
        "res": d_res,
    }
    d_logits = matrix_gradient(manifold, res_logits(params), streams, d_res)
    if "alpha_logit" in params:
        gradients["alpha_logit"] = d_logits[0]
    elif "res_logits" in params:
        gradients["res_logits"] = d_logits
    return gradients


def numerical_gradient(loss, array, step=1e-4):
    """d loss / d array by central differences of fourth order: error ~ step**4, about 1e-12."""
    array = np.asarray(array, np.float64)
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        shifted = {}
        for k in (-2, -1, 1, 2):
            moved = array.copy()
            moved[index] += k * step
            shifted[k] = loss(moved)
        gradient[index] = (8 * (shifted[1] - shifted[-1]) - (shifted[2] - shifted[-2])) / (
            12 * step
        )
    return gradient
