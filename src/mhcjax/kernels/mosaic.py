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

__all__ = ["fits", "fits_backward", "project", "project_backward"]

WIDE = jnp.float32
TOKENS = 128  # of a warpgroup in the projection
ROWS = 64  # of a tile of its backward pass
STEP = 64  # of E: 128 bytes, what is swizzled together
HOPPER = ("H100", "H200", "GH200")


def fits(x: jax.Array, columns: int) -> bool:
    """Whether x[T, E] is what these kernels take, on a device that has their instructions."""
    kind = jax.devices()[0].device_kind
    whole = x.dtype == jnp.bfloat16 and x.shape[0] % TOKENS == 0
    return whole and columns in (32, 64) and any(name in kind for name in HOPPER)


def fits_backward(x: jax.Array, columns: int) -> bool:
    """The same for `project_backward` of x[T, N, D], whose programs hold all streams."""
    return x.shape[1] <= 4 and columns == 32 and fits(x, columns)


def _swizzled(columns: int = STEP) -> tuple:
    """How tiles of so many columns of bfloat16s lie in shared memory, for the tensor cores."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def _parameters() -> Any:
    return plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )


def project(x: jax.Array, w: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`projection.project`."""
    T, E = x.shape
    C = columns_of(w)
    # A tile of the weight serves two warpgroups, of so many tokens each.
    groups = 2 if T % (2 * TOKENS) == 0 else 1
    tokens = groups * TOKENS
    step = min(4096 // C, E & -E)  # of E: what two tiles of each have room for
    split = largest_divisor(E // step, blocks.split_mosaic)
    share = E // split
    tile = partial(plgpu.BlockSpec, transforms=_swizzled())

    def kernel(
        x_ref: Any, w_ref: Any, z_ref: Any, square_ref: Any, z_smem: Any, square_smem: Any
    ) -> None:
        s, t, own = (jax.lax.axis_index(a) for a in ("split", "tokens", "warpgroup"))
        rows, here = pl.ds(own * TOKENS, TOKENS), pl.ds(s * share, share)

        def work(pipeline: Any) -> None:
            def summed(z: Any) -> tuple[jax.Array, jax.Array]:
                accs.append(z)
                zeros = jnp.zeros(TOKENS, WIDE)
                square = pipeline(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1)))
                return z[...], square

            found, square = pl.run_scoped(summed, plgpu.ACC((TOKENS, 2 * C), WIDE))
            z_smem[rows] = found[:, C:] + found[:, :C]
            square_smem[rows] = square
            plgpu.commit_smem()
            mine = pl.ds(t * tokens + own * TOKENS, TOKENS)
            plgpu.copy_smem_to_gmem(z_smem.at[rows], z_ref.at[s, mine, :])
            plgpu.copy_smem_to_gmem(square_smem.at[rows], square_ref.at[s, mine])
            plgpu.wait_smem_to_gmem(0)

        accs: list = []

        def body(_: Any, x_s: Any, w_s: Any, square: jax.Array) -> Any:
            plgpu.wgmma(accs[0], x_s.at[rows], w_s)
            x = plgpu.layout_cast(x_s[rows], plgpu.Layout.WGMMA).astype(WIDE)
            square = square + jnp.sum(x * x, axis=1)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # x has been read, before a copy may write over it
            return square

        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(1, share // step),
            in_specs=[
                tile((tokens, step), lambda i, j: (i, j)),
                tile((step, 2 * C), lambda i, j: (j, i)),
            ],
            max_concurrent_steps=2,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=groups,
            compute_context=work,
        )(x_ref.at[pl.ds(t * tokens, tokens), here], w_ref.at[here, pl.ds(2 * C, 2 * C)])

    call = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((split, T, C), WIDE),
            jax.ShapeDtypeStruct((split, T), WIDE),
        ),
        scratch_types=[plgpu.SMEM((tokens, C), WIDE), plgpu.SMEM((tokens,), WIDE)],
        # The shares of one tile of tokens beside each other: the last tokens stay in the cache,
        # whole, and the read begins with them.
        grid=(T // tokens, split),
        grid_names=("tokens", "split"),
        num_threads=groups + 1,
        thread_name="warpgroup",
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
    dout: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """`projection.project_backward`."""
    T, N, D = x.shape
    C = columns_of(w)
    tiles = T // ROWS
    # As many programs as run at once, but two for a slice of the width, to hide each other's waits.
    split = min(max(2, blocks.programs_mosaic // (D // STEP)), tiles)
    half = STEP // 2  # of a tile's columns, for one of the two warpgroups
    written = 0 if dout is None else N  # streams of dout
    tile = partial(plgpu.BlockSpec, transforms=_swizzled(half))

    def kernel(x_ref: Any, w_ref: Any, dz_ref: Any, scalars_ref: Any, *refs: Any) -> None:
        *given, dx_ref, dw_ref, w_smem, out_smem, barriers = refs
        d, s, own = (jax.lax.axis_index(a) for a in ("slice", "split", "warpgroup"))
        columns = pl.ds(own * half, half)
        here = [pl.ds(n * D + d * STEP, STEP) for n in range(N)]
        mine = [pl.ds(n * D + d * STEP + own * half, half) for n in range(N)]
        w_rows = [pl.ds(n * STEP + own * half, half) for n in range(N)]
        # The first programs of a slice have a tile more.
        more = (s < tiles % split).astype(jnp.int32) if tiles % split else 0

        def place(i: Any, j: Any) -> tuple:
            # All programs walk over the tokens side by side: what they share is fetched once.
            return i * split + s, j

        def work(pipeline: Any) -> None:
            for n in range(N):
                part = w_ref.at[mine[n], pl.ds(0, 2 * C)]
                plgpu.copy_gmem_to_smem(part, w_smem.at[w_rows[n]], barriers.at[own])
                plgpu.barrier_wait(barriers.at[own])

            def summed(*sums: Any) -> None:
                dw_accs.extend(sums)
                pipeline(jnp.int32(0))
                for n, dw in enumerate(sums):
                    dw_ref[s, :, mine[n]] = dw[...]

            pl.run_scoped(summed, *[plgpu.ACC((2 * C, half), WIDE)] * N)
            plgpu.wait_smem_to_gmem(0)

        dw_accs: list = []

        def body(at: Any, *smem: Any) -> Any:
            *given, carry = smem
            (x_s, dz_s, scalars_s), rest = (given[:N], *given[N : N + 2]), given[N + 2 :]

            def load(ref: Any) -> jax.Array:
                return plgpu.layout_cast(ref[:, columns], plgpu.Layout.WGMMA).astype(WIDE)

            def times(row: int, loaded: jax.Array) -> jax.Array:
                column = plgpu.layout_cast(scalars_s[row], plgpu.Layout.WGMMA.reduce(1))
                return jax.lax.broadcast_in_dim(column, (ROWS, half), [0]) * loaded

            loaded = [load(ref) for ref in rest]
            dout, du = loaded[:written], loaded[written:]
            for n in range(N):

                def made(acc: Any, n: int = n) -> jax.Array:
                    # [high | low] of dz with [high | high] of w: dz whole, w rounded as dx will be.
                    w_T = w_smem.at[w_rows[n]].transpose((1, 0))
                    plgpu.wgmma(acc, dz_s.transpose((1, 0)), w_T)
                    plgpu.wgmma(dw_accs[n], dz_s, x_s[n].at[:, columns])
                    out = times(0, load(x_s[n]))
                    for vector in du:
                        out = out + times(1 + n, vector)
                    for m, stream in enumerate(dout):
                        out = out + times(1 + N + m * N + n, stream)
                    return out + acc[...]

                out = pl.run_scoped(made, plgpu.ACC((ROWS, half), WIDE))
                # In turns: the copy of the one before may still read its half.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                turn = jax.lax.rem(at[0] * N + n, jnp.int32(2)) if N % 2 else n % 2
                out_s = out_smem.at[own, turn]
                out_s[...] = out.astype(x.dtype)
                plgpu.commit_smem()
                rows = pl.ds(place(*at)[0] * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(out_s, dx_ref.at[rows, mine[n]])
            return carry

        square = tile((ROWS, STEP), place)
        inputs = [(x_ref.at[:, e], square) for e in here]
        turned = plgpu.BlockSpec(
            (2 * C, ROWS), lambda *i: place(*i)[::-1], transforms=_swizzled(half)
        )
        inputs += [(dz_ref, turned)]
        count = scalars.shape[0]
        inputs += [(scalars_ref, plgpu.BlockSpec((count, ROWS), lambda *i: place(*i)[::-1]))]
        if dout is not None:
            inputs += [(given[0].at[:, e], square) for e in here]
        if du is not None:
            inputs += [(given[-1].at[:, pl.ds(d * STEP, STEP)], square)]
        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(tiles // split + more, 1),
            in_specs=[spec for _, spec in inputs],
            max_concurrent_steps=blocks.stages_backward_mosaic,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=work,
        )(*(ref for ref, _ in inputs))

    flat = [a.reshape(T, -1) for a in (dout, du) if a is not None]
    call = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((T, N * D), x.dtype),
            jax.ShapeDtypeStruct((split, 2 * C, N * D), WIDE),
        ),
        scratch_types=[
            plgpu.SMEM((N * STEP, 2 * C), x.dtype, transforms=_swizzled(half)),
            plgpu.SMEM((2, 2, ROWS, half), x.dtype, transforms=_swizzled(half)),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(split, D // STEP),
        grid_names=("split", "slice"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mhc_project_backward",
        compiler_params=_parameters(),
    )
    dx, dw = call(x.reshape(T, -1), w, dz, scalars, *flat)
    return dx.reshape(x.shape), jnp.swapaxes(dw[:, :C] + dw[:, C:], 1, 2)
