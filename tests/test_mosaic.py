"""The projection's kernels for Hopper, interpreted on a CPU: values in float64, and no race.

JAX's interpreter keeps a clock for every warpgroup and for the copy engine, and says where two
accesses of one tile are in no order. A tile that is overwritten too soon is right on most GPUs most
of the time: here it is found every time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mhcjax.kernels import mosaic, projection
from mhcjax.kernels.blocks import Blocks
from tests import layers

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="JAX 0.10 cannot interpret Mosaic's transposed tiles",
)

FIELDS = [f.name for f in dataclasses.fields(getattr(plgpu, "InterpretGPUParams", Blocks))]
D = 128
PROJECTED = 2 * D  # of a stream, for the projection: several steps for each of two programs
# Few programs and stages, so that tiles are used again.
BLOCKS = Blocks(split_mosaic=2, programs_mosaic=2)


def interpreted(f, *arguments):
    """What f returns."""
    how = {"on_race": "warn"} if "on_race" in FIELDS else {}  # JAX 0.11 always goes on
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **how)):
        return jax.device_get(jax.jit(f)(*arguments))


@pytest.fixture
def raced(capsys, caplog):
    """Whether a race was found since this was asked last."""

    def ask():
        found = "RACE DETECTED" in capsys.readouterr().out + caplog.text
        caplog.clear()
        return found

    return ask


def draw(N, T, columns, D=D):
    """x[T, N, D] and the weight[N * D, columns], as it is and as the kernels take it."""
    rng = layers.rng_of("mosaic", N, T, columns)
    x = jnp.asarray(rng.standard_normal((T, N, D)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((N * D, columns)) / np.sqrt(N * D), jnp.float32)
    return rng, x, w, projection.weights(w, x.dtype)


def wide(a):
    return np.asarray(a, np.float64)


@pytest.mark.parametrize(
    ("N", "T", "columns"), [(4, 256, 24), (4, 384, 24), (1, 128, 3), (6, 256, 48)]
)
def test_projection(N, T, columns, raced):
    """Weights are held to 2^-17 = 8e-6, everything else in float32."""
    _, x, w, packed = draw(N, T, columns, PROJECTED)
    flat = x.reshape(T, -1)
    z, square = interpreted(lambda *a: mosaic.project(*a, BLOCKS), flat, packed)
    assert not raced()
    assert z.shape[0] == square.shape[0] == BLOCKS.split_mosaic
    z = wide(z).sum(0)
    assert layers.error(z[:, :columns], wide(flat) @ wide(w)) < layers.FINE
    assert not z[:, columns:].any()
    assert layers.error(wide(square).sum(0), (wide(flat) ** 2).sum(1)) < layers.LIMITS["float32"]


def test_a_tile_that_is_overwritten_without_a_fence_is_caught(raced, monkeypatch):
    """By JAX 0.12, whose detector knows that a copy is ordered after a read by a fence alone."""
    if "on_race" not in FIELDS:
        pytest.skip("JAX 0.11 takes a wait for a fence")
    _, x, _, packed = draw(4, 256, 24, PROJECTED)
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    interpreted(lambda *a: mosaic.project(*a, BLOCKS), x.reshape(256, -1), packed)
    assert raced()


def given_to_backward(N, T, du, dout):
    """(arguments, wanted dx, wanted dw) of a backward pass, in float64."""
    rng, x, _, w = draw(N, T, 24)
    C = projection.columns_of(w)
    dz = jnp.asarray(rng.standard_normal((C, T)), jnp.float32)
    high, low = projection._two(dz, x.dtype)
    rows = jnp.asarray(rng.standard_normal((1 + N * du + N * N * dout, T)), jnp.float32)
    du = jnp.asarray(rng.standard_normal((T, D)), x.dtype) if du else None
    dout = jnp.asarray(rng.standard_normal((T, N, D)), x.dtype) if dout else None

    scale, pre, res = np.split(wide(rows), [1, 1 + N])
    # Both rounded to the dtype of the streams, as dx will be.
    dx = scale.T[:, :, None] * wide(x)
    dx += (wide(high).T @ wide(w[:, :C]).T).reshape(dx.shape)
    if du is not None:
        dx += pre.T[:, :, None] * wide(du)[:, None]
    if dout is not None:
        dx += np.einsum("mnt,tmd->tnd", res.reshape(N, N, T), wide(dout))
    dw = wide(x).reshape(T, -1).T @ (wide(high) + wide(low)).T
    return (x, w, jnp.concatenate([high, low]), rows, du, dout), dx, dw


def backward(arguments):
    dx, dw = interpreted(lambda *a: mosaic.project_backward(*a, BLOCKS), *arguments)
    return wide(dx), wide(dw).sum(0)


@pytest.mark.parametrize(("du", "dout"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_backward(N, du, dout, raced):
    """Five tiles of 64 tokens for two programs: one has more, and both use every tile again."""
    arguments, dx, dw = given_to_backward(N, 320, du, dout)
    found_dx, found_dw = backward(arguments)
    assert not raced()
    assert layers.error(found_dx, dx) < layers.LIMITS["bfloat16"]
    assert layers.error(found_dw, dw) < layers.LIMITS["float32"]


@pytest.mark.parametrize("N", [3, 4])
def test_an_output_tile_that_is_written_before_it_is_copied_is_caught(N, raced, monkeypatch):
    """Which waits for all copies but two, of two tiles."""
    arguments, *_ = given_to_backward(N, 320, True, True)
    wait = plgpu.wait_smem_to_gmem
    monkeypatch.setattr(plgpu, "wait_smem_to_gmem", lambda n, **how: wait(2 * n, **how))
    backward(arguments)
    assert raced()


def test_a_transposed_res_is_caught():
    (x, w, dz, rows, *rest), dx, _ = given_to_backward(3, 320, True, True)
    res = rows[4:].reshape(3, 3, -1).swapaxes(0, 1).reshape(9, -1)
    found, _ = backward((x, w, dz, jnp.concatenate([rows[:4], res]), *rest))
    assert layers.error(found, dx) > 0.1
