"""Layers that the tests of the kernels compute, drawn from a seed, and their checks.

A layer is a preset with its streams N and width D. Its branch is f(u) = u + y, so that the branch's
output has a gradient of its own and passes one on to what is read.
"""

import warnings
import zlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import mhcjax as mhc
from mhcjax import presets
from tests import oracle_layer

# ||found - wanted|| / ||wanted||. A bfloat16 is off by up to 2^-9 = 2e-3, 1.1e-3 in the mean of
# squares; a result is rounded three times at most (what is read, the branch's output, itself).
LIMITS = {"bfloat16": 4e-3, "float32": 2e-6}
# What is float32 of bfloat16 streams without rounding between: weights are held to 2^-17 = 8e-6.
FINE = 2e-5

STATIC = {"mhc_n2": (2,), "mhc_n4": (4,)}  # and their counts of streams

# Interpreted kernels are many small loops: a third of the time goes into making them fast.
COMPILER = {"xla_backend_optimization_level": 0}


def compiled(f):
    """`f`, jitted for whatever runs the kernels here."""
    return jax.jit(f, compiler_options=COMPILER if jax.default_backend() == "cpu" else None)


def rng_of(*what):
    """A generator for these words: the same in every process."""
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def spec_of(name, N):
    if name in STATIC:
        return presets.named(name)
    return presets.named(name, streams=N)


def draw(name, N, D, lead, dtype):
    """(spec, params, x, y, cotangents of the outputs), every leaf at random.

    Logits are of order one: their gradients are neither saturated nor those of a uniform matrix.
    """
    rng, spec = rng_of(name, N, D, lead, dtype), spec_of(name, N)
    shapes = spec.shapes(D)

    def one(leaf, shape):
        a = rng.standard_normal(shape)
        if leaf == "projection":
            a /= np.sqrt(shape[0])
        if leaf in ("scale", "gain"):
            a = 1 + 0.3 * a
        return jnp.asarray(a, jnp.float32)

    params = {leaf: one(leaf, shape) for leaf, shape in shapes.items()}
    stream, vector = (*lead, N, D), (*lead, D)
    wanted = (stream, vector, stream, *[vector] * spec.carried)
    x, y, *d = (jnp.asarray(rng.standard_normal(s), dtype) for s in wanted)
    return spec, params, x, y, tuple(d)


def sublayer(spec, params, x, y, implementation="pallas"):
    """Ours: a tuple, of the streams and of the next u where pre is carried."""
    one = mhc.connect_single_pass if spec.carried else mhc.connect
    out = one(spec, params, lambda u: u + y, x, implementation=implementation)
    return out if spec.carried else (out,)


def pulled(f, arguments, d):
    """(outputs, gradients of sum(d * output) for all arguments) of `f(*arguments)`.

    A warning is an error: where kernels are asked for, what replaces them must not pass for them.
    """

    def run(arguments, d):
        outputs, pull = jax.vjp(f, *arguments)
        return outputs, pull(d)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="implementation")
        return jax.device_get(compiled(run)(arguments, d))


def error(found, wanted, terms=None):
    """||found - wanted|| / ||wanted||, or over ||sums of absolute terms||; 0 where both are 0."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.size == wanted.size, (found.shape, wanted.shape)
    off = np.linalg.norm(found.reshape(-1) - wanted.reshape(-1))
    return off / max(np.linalg.norm(wanted if terms is None else terms), 1e-30)


def compare(found, wanted, terms, limit):
    """AssertionError that names the first of `found` that is off by more than its limit.

    `limit` is a number, or a function of the array. NaN is off by more than any limit.
    """
    assert set(found) == set(wanted), (sorted(found), sorted(wanted))
    errors = {name: error(a, wanted[name], terms.get(name)) for name, a in found.items()}
    for name, off in errors.items():
        most = limit(found[name]) if callable(limit) else limit
        if not off <= most:
            raise AssertionError(f"{name} is off by {off:.3g}, the limit is {most:.3g}: {errors}")
    return errors


def flat(lead, *arrays):
    """In float64, with one axis of tokens."""
    T = int(np.prod(lead))
    return [np.asarray(a, np.float64).reshape(T, *a.shape[len(lead) :]) for a in arrays]


def named(prefix, names, arrays):
    return {f"{prefix}{n}": a for n, a in zip(names, arrays, strict=True)}


def gradients_of(own):
    return {f"d {name}": a for name, a in own.items()}


def check_layer(name, N, D, lead, dtype, rule=None):
    """A whole layer on the kernels against the oracle, outputs and all gradients; -> the errors."""
    spec, params, x, y, d = draw(name, N, D, lead, dtype)
    spec = replace(spec, rule=rule or spec.rule)
    outputs, (d_params, dx, dy) = pulled(partial(sublayer, spec), (params, x, y), d)
    assert all(a.dtype == x.dtype for a in (*outputs, dx, dy))
    assert all(d_params[leaf].dtype == np.float32 for leaf in params)

    x, y, *d = flat(lead, x, y, *d)
    known = "static" if name in STATIC else name
    wanted, own, terms = oracle_layer.layer(
        known, params, x, y, d if spec.carried else d[0], spec.rule
    )
    names = ("streams", "next u")[: len(wanted)]
    return compare(
        named("", names, outputs) | gradients_of({"x": dx, "y": dy, **d_params}),
        named("", names, wanted) | gradients_of(own),
        gradients_of(terms),
        LIMITS[dtype],
    )


def one_step(dtype):
    """The limit of what is not rounded to the streams' dtype on its way: of float32 a finer one."""
    return lambda a: min(FINE, LIMITS[dtype]) if a.dtype == np.float32 else LIMITS[dtype]


def check_mix(name, N, D, lead, dtype, reads):
    """`mix`, or `mix_and_read`, on the kernels against the oracle."""
    spec, params, x, y, _ = draw(name, N, D, lead, dtype)
    rng = rng_of("mix", name, N, D, lead)
    shapes = [(*lead, N), (*lead, N), (*lead, N, N)]
    d = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]

    def apply(params, x):
        if reads:
            mix, u = mhc.mix_and_read(spec, params, x, implementation="pallas")
            return mix.pre, mix.post, mix.res, u
        mix = mhc.mix(spec, params, x, implementation="pallas")
        return mix.pre, mix.post, mix.res

    d = (*d, y) if reads else tuple(d)
    outputs, (d_params, dx) = pulled(apply, (params, x), d)
    x, *d = flat(lead, x, *d)
    wanted, pull = oracle_layer.dynamic_mix(name, params, x)
    more = 0
    if reads:
        u, pull_read = oracle_layer.read(x, wanted[0])
        more, d_pre = pull_read(d.pop())
        d[0], wanted = d[0] + d_pre, (*wanted, u)
    d_x, own, terms = pull(*d)
    names = ("pre", "post", "res", "u")[: len(wanted)]
    return compare(
        named("", names, outputs) | gradients_of({"x": dx, **d_params}),
        named("", names, wanted) | gradients_of({"x": d_x + more, **own}),
        gradients_of(terms),
        one_step(dtype),
    )


def check_read_and_write(N, D, lead, dtype, rule, shared):
    """`read` and `write` with coefficients that all tokens share, or one set each."""
    rng, own = rng_of("write", N, D, lead, dtype, rule, shared), () if shared else lead
    shapes = [(*own, N), (*own, N), (*own, N, N)]
    pre, post, res = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    wanted = [(*lead, N, D), (*lead, D), (*lead, D), (*lead, N, D)]
    x, y, du, dout = (jnp.asarray(rng.standard_normal(s), dtype) for s in wanted)

    def apply(x, y, pre, post, res):
        mix = mhc.Mix(pre, post, res)
        u = mhc.read(x, mix, implementation="pallas")
        return u, mhc.write(x, y, mix, rule=rule, implementation="pallas")

    outputs, found = pulled(apply, (x, y, pre, post, res), (du, dout))
    x, y, du, dout = flat(lead, x, y, du, dout)
    pre, post, res = flat(own, pre, post, res)
    u, pull_read = oracle_layer.read(x, pre)
    out, pull_write = oracle_layer.write(x, y, post, res, rule)
    (dx_read, d_pre), (dx, dy, d_post, d_res) = pull_read(du), pull_write(dout)
    small = [oracle_layer.pulled(*pair) for pair in ((d_pre, pre), (d_post, post), (d_res, res))]
    names = ("x", "y", "pre", "post", "res")
    return compare(
        named("", ("u", "streams"), outputs) | named("d ", names, found),
        named("", ("u", "streams"), (u, out))
        | named("d ", names, (dx + dx_read, dy, *(d for d, _ in small))),
        named("d ", names[2:], [terms for _, terms in small]),
        one_step(dtype),
    )
