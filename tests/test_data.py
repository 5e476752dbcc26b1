"""Batches are functions of (seed, step), validation windows are fixed."""

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcjax.data import batch, open_tokens, validation_batches

COUNT = np.arange(5000, dtype="<u2")  # a row of it shows where its window starts
SHAPE = {"seed": 3, "step": 11, "batch": 4, "length": 8}


def make(**changes) -> np.ndarray:
    return batch(COUNT, **{**SHAPE, **changes})


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shard_is_a_read_only_map(tmp_path, dtype):
    COUNT.astype(dtype).tofile(tmp_path / "t.bin")
    tokens = open_tokens(tmp_path / "t.bin", dtype)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.dtype(dtype)
    assert (tokens == COUNT).all()
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    assert (batch(tokens, **SHAPE) == make()).all()


def test_shards_that_can_not_be(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(ValueError, match=r"t\.bin does not exist"):
        open_tokens(path, "<u2")
    for data in (b"", b"123"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"holds {len(data)} bytes.*rebuilt"):
            open_tokens(path, "<u2")


def test_rows_are_windows_of_the_shard():
    x = make(micro_batches=3)
    assert x.shape == (3, 4, 9) and x.dtype == np.int32
    assert (np.diff(x) == 1).all()  # contiguous
    assert len(np.unique(x[..., 0])) == 12


def test_a_batch_is_a_function_of_seed_and_step():
    straight = [make(step=s) for s in range(20)]
    for s in reversed(range(20)):  # any order, any number of times
        assert (make(step=s) == straight[s]).all()
    assert len({x.tobytes() for x in straight}) == 20
    assert (make(seed=4) != make()).any()
    assert (make(seed=11, step=3) != make(seed=3, step=11)).any()


def test_windows_are_those_of_the_documented_formula_for_ever():
    assert make(micro_batches=2)[..., 0].tolist() == [
        [3018, 859, 4604, 4556],
        [215, 4608, 4527, 2839],
    ]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_micro_batches_are_rows_of_one_large_batch(a, b, seed, step):
    small = make(seed=seed, step=step, batch=b, micro_batches=a)
    large = make(seed=seed, step=step, batch=a * b)
    assert (small.reshape(1, a * b, 9) == large).all()


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 100))
def test_processes_read_their_rows_only(processes, step):
    whole = make(batch=8, micro_batches=2, step=step)
    share = 8 // processes
    parts = [
        make(batch=8, micro_batches=2, step=step, rows=slice(p * share, (p + 1) * share))
        for p in range(processes)
    ]
    assert (np.concatenate(parts, axis=1) == whole).all()
    if processes > 1:
        assert (parts[0] != whole[:, share : 2 * share]).any()  # another process's rows differ


def test_only_the_rows_asked_for_are_read():
    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, index):
            Counted.read += np.asarray(index).size
            return np.asarray(self)[index]

    batch(COUNT.view(Counted), **{**SHAPE, "batch": 8, "rows": slice(2, 4)})
    assert Counted.read == 2 * 9


def test_starts_cover_the_shard_evenly():
    tokens = np.arange(17)
    starts = batch(tokens, seed=0, step=0, batch=60_000, length=6)[0, :, 0]
    counts = np.bincount(starts, minlength=11)
    assert len(counts) == 11  # 0 to 10, the first and the last window included
    expected = 60_000 / 11
    assert ((counts - expected) ** 2 / expected).sum() < 35  # chi-square of 10, p = 1e-4


def test_the_shortest_shard_has_one_window():
    x = batch(np.arange(9), **SHAPE)
    assert (x == np.arange(9)).all()
    with pytest.raises(ValueError, match=r"8 tokens and a row needs 9: .*--data\.length"):
        batch(np.arange(8), **SHAPE)
    with pytest.raises(ValueError, match="8 tokens and a row needs 9"):
        validation_batches(np.arange(8), batch=1, length=8, count=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"step": -1},
        {"batch": 0},
        {"length": 0},
        {"micro_batches": 0},
        {"rows": slice(0, 0)},
        {"rows": slice(4, 8)},
        {"rows": slice(2, 5)},
        {"rows": slice(3, 1, -1)},
    ],
)
def test_arguments_that_can_not_be(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name} is ") as error:
        make(**bad)
    assert str(value) in str(error.value) and "give" in str(error.value)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.integers(0, 400))
def test_validation_windows_are_even_and_apart(size, length, count, extra):
    tokens = np.arange(length + 1 + extra)
    batches = list(validation_batches(tokens, batch=size, length=length, count=count))
    assert all(x.shape == (size, length + 1) and x.dtype == np.int32 for x in batches)
    fit = len(tokens) // (length + 1)
    assert len(batches) == max(1, min(count, fit // size))
    rows = np.concatenate(batches)
    starts = rows[:, 0]
    assert (rows == starts[:, None] + np.arange(length + 1)).all()
    assert starts[0] == 0
    if len(starts) > 1:
        assert starts[-1] == extra  # the last window ends at the last token
        gaps = np.diff(starts)
        assert gaps.max() - gaps.min() <= 1
        assert gaps.min() > length or fit < size


def test_validation_is_the_same_each_time_and_refuses_at_once():
    def first():
        return list(validation_batches(COUNT, batch=4, length=8, count=3))

    assert all(map(np.array_equal, first(), first()))
    for bad in ({"batch": 0}, {"length": 0}, {"count": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is 0"):  # before any iteration
            validation_batches(COUNT, **{"batch": 4, "length": 8, "count": 3, **bad})


def test_numpy_integers_are_integers():
    assert (make(seed=np.int64(3), step=np.uint32(11)) == make()).all()
    with pytest.raises(TypeError):
        make(step=operator.truediv(11, 1))
