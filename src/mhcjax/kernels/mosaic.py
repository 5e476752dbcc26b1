"""The projection and its backward pass on Hopper: Pallas, lowered through Mosaic GPU.

The same functions as in `projection`, for bfloat16 streams in whole tiles, at the speed of memory:
tiles come by the copy engine while the tensor cores work on those before.

Axis key: T token, N source stream, D width, E = N*D flattened, C coefficient column, S split.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.projection import columns_of
from mhcjax.kernels.triton import largest_divisor

__all__ = ["fits", "project", "project_backward"]

WIDE = jnp.float32
TOKENS = 128  # of a tile of the projection: its weight comes half as often
ROWS = 64  # of a tile of its backward pass
STEP = 64  # of E: 128 bytes, what is swizzled together
HOPPER = ("H100", "H200", "GH200")


def fits(x: jax.Array, columns: int) -> bool:
    """Whether x[T, E] is what these kernels take, on a device that has their instructions."""
    kind = jax.devices()[0].device_kind
    whole = x.dtype == jnp.bfloat16 and x.shape[0] % TOKENS == 0
    return whole and columns in (32, 64) and any(name in kind for name in HOPPER)


def _swizzled() -> tuple:
    """How a tile of bfloat16s lies in shared memory, for the tensor cores."""
    return plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(2 * STEP)


def _parameters() -> Any:
    return plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )


def project(x: jax.Array, w: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`projection.project`."""
    T, E = x.shape
    C = columns_of(w)
    step = min(blocks.step_project_mosaic, E & -E)
    split = largest_divisor(E // step, blocks.split_mosaic)
    share = E // split
    tile = partial(plgpu.BlockSpec, transforms=_swizzled())

    def kernel(
        x_ref: Any, w_ref: Any, z_ref: Any, square_ref: Any, z_smem: Any, square_smem: Any, z: Any
    ) -> None:
        s, t = jax.lax.axis_index("split"), jax.lax.axis_index("tokens")
        mine, here = pl.ds(t * TOKENS, TOKENS), pl.ds(s * share, share)

        def body(_: Any, x_s: Any, w_s: Any, square: jax.Array) -> jax.Array:
            plgpu.wgmma(z, x_s, w_s)
            x = plgpu.layout_cast(x_s[...], plgpu.Layout.WGMMA).astype(WIDE)
            square = square + jnp.sum(x * x, axis=1)
            plgpu.wgmma_wait(0)
            return square

        zeros = jnp.zeros(TOKENS, WIDE)
        square = plgpu.emit_pipeline(
            body,
            grid=(1, share // step),
            in_specs=[
                tile((TOKENS, step), lambda i, j: (i, j)),
                tile((step, 2 * C), lambda i, j: (j, i)),
            ],
            max_concurrent_steps=blocks.stages_mosaic,
            init_carry=plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1)),
        )(x_ref.at[mine, here], w_ref.at[here, pl.ds(2 * C, 2 * C)])
        found = z[...]
        z_smem[...] = found[:, C:] + found[:, :C]
        square_smem[...] = square
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(z_smem, z_ref.at[s, mine, :])
        plgpu.copy_smem_to_gmem(square_smem, square_ref.at[s, mine])
        plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((split, T, C), WIDE),
            jax.ShapeDtypeStruct((split, T), WIDE),
        ),
        # JAX takes accumulators here; its type of scratch does not name them.
        scratch_types=[
            plgpu.SMEM((TOKENS, C), WIDE),
            plgpu.SMEM((TOKENS,), WIDE),
            plgpu.ACC((TOKENS, 2 * C), WIDE),  # type: ignore[list-item]
        ],
        # The shares of one tile of tokens beside each other: the last tokens stay in the cache,
        # whole, and the read begins with them.
        grid=(T // TOKENS, split),
        grid_names=("tokens", "split"),
        kernel_name="mhc_project",
        compiler_params=_parameters(),
    )
    return call(x, w)


def project_backward(
    x: jax.Array,
    w: jax.Array,
    dz: jax.Array,
    scalars: jax.Array,
    du: jax.Array | None,
    dx: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """`projection.project_backward`; dx goes to a new buffer."""
    T, E = x.shape
    C = columns_of(w)
    N = scalars.shape[0] - 1
    D = E // N
    step = min(blocks.step_mosaic if C == 32 else STEP, D & -D)  # registers: the sums are step * 2C
    tiles = T // ROWS
    # As many programs as run at once, but two for a slice of the width, to hide each other's waits.
    split = min(max(2, blocks.programs_mosaic // (E // step)), tiles)
    tile = partial(plgpu.BlockSpec, transforms=_swizzled())

    def kernel(*refs: Any) -> None:
        x_ref, w_ref, dz_ref, scalars_ref, before_ref = refs[:5]
        dx_ref, dw_ref, w_smem, dw_smem, barrier, dw_acc = refs[-6:]
        own, s = jax.lax.axis_index("slice"), jax.lax.axis_index("split")
        n, d = jax.lax.rem(own, jnp.int32(N)), jax.lax.div(own, jnp.int32(N))
        here, columns = pl.ds(n * D + d * step, step), pl.ds(d * step, step)
        # The first programs of a slice have a tile more.
        more = (s < tiles % split).astype(jnp.int32) if tiles % split else 0

        def place(i: Any, j: Any) -> tuple:
            # All programs walk over the tokens side by side: what they share is fetched once.
            return i * split + s, j

        plgpu.copy_gmem_to_smem(w_ref.at[here, pl.ds(0, 2 * C)], w_smem, barrier)
        plgpu.barrier_wait(barrier)

        def body(_: Any, *smem: Any) -> None:
            x_s, before_s, scale_s, dz_s, *read = smem[:-1]

            def products(acc: Any) -> jax.Array:
                # [high | low] of dz with [high | high] of w: dz whole, w rounded as dx will be.
                plgpu.wgmma(acc, dz_s.transpose((1, 0)), w_smem.transpose((1, 0)))
                plgpu.wgmma(dw_acc, x_s.transpose((1, 0)), dz_s.transpose((1, 0)))
                return acc[...]

            def load(ref: Any) -> jax.Array:
                return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(WIDE)

            def along(ref: Any) -> jax.Array:
                column = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1))
                return jax.lax.broadcast_in_dim(column, (ROWS, step), [0])

            out = pl.run_scoped(products, plgpu.ACC((ROWS, step), WIDE))
            out = out + load(before_s) + along(scale_s) * load(x_s)
            if read:
                out = out + along(read[0]) * load(read[1])
            smem[-1][...] = out.astype(x.dtype)
            plgpu.wgmma_wait(0)

        square, row = tile((ROWS, step), place), plgpu.BlockSpec((ROWS,), lambda *i: place(*i)[:1])
        inputs = [
            (x_ref.at[:, here], square),
            (before_ref.at[:, here], square),
            (scalars_ref.at[0], row),
            (dz_ref, tile((2 * C, ROWS), lambda *i: place(*i)[::-1])),
        ]
        if du is not None:
            inputs += [(scalars_ref.at[1 + n], row), (refs[5].at[:, columns], square)]
        plgpu.emit_pipeline(
            body,
            grid=(tiles // split + more, 1),
            in_specs=[spec for _, spec in inputs],
            out_specs=[square],
            max_concurrent_steps=blocks.stages_backward_mosaic,
        )(*(ref for ref, _ in inputs), dx_ref.at[:, here])
        dw = dw_acc[...]
        dw_smem[...] = dw[:, C:] + dw[:, :C]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dw_smem, dw_ref.at[s, here, :])
        plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((T, E), x.dtype), jax.ShapeDtypeStruct((split, E, C), WIDE)),
        # JAX takes accumulators here; its type of scratch does not name them.
        scratch_types=[
            plgpu.SMEM((step, 2 * C), x.dtype, transforms=_swizzled()),
            plgpu.SMEM((step, C), WIDE),
            plgpu.Barrier(),
            plgpu.ACC((step, 2 * C), WIDE),  # type: ignore[list-item]
        ],
        grid=(split, E // step),
        grid_names=("split", "slice"),
        kernel_name="mhc_project_backward",
        compiler_params=_parameters(),
    )
    return call(x, w, dz, scalars, dx, *(() if du is None else (du,)))
