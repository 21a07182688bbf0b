"""Which axis is which: declared, or the only one that fits, or refused. Never guessed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from parity import words
from parity.compare.align import AmbiguousLayoutError, Pair, align
from parity.dump import Entry
from parity.reasons import Gap
from parity.sites import Dims, Site

B, T, H, G, D, F = 2, 5, 6, 3, 4, 7
LABELS = {
    "hidden": (("batch", "token", "feature"), (B, T, F)),
    "q_proj": (("batch", "token", "head*head_dim"), (B, T, H * D)),
    "q_norm": (("batch", "token", "head", "head_dim"), (B, T, H, D)),
    "q_rope": (("batch", "head", "token", "head_dim"), (B, H, T, D)),
    "probs": (("batch", "head", "token", "key"), (B, H, T, T)),
}


def site(kind: str, batch: int = B, **sizes: int) -> Site:
    dims, shape = LABELS[kind]
    sizes = {"batch": batch, **sizes}
    shape = tuple(sizes.get(dim, size) for dim, size in zip(dims, shape, strict=True))
    return Site(f"model.layers.0.{kind}", dims, shape, "float32", "model.layers.0")


def entry(shape: tuple[int, ...], dims: str | None = None) -> Entry:
    return Entry("x", tuple(dims.split()) if dims else None, shape, "float32")


def numbers(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def paired(entry: Entry, site: Site, head_dim: int | None = D) -> Pair:
    found = align(entry, site, head_dim)
    assert isinstance(found, Pair), found
    return found


# (site, einops-like order of the candidate's axes, what the dump declares)
DECLARED = [
    ("hidden", "btf", "batch token hidden"),
    ("hidden", "tbf", "token batch hidden"),
    ("hidden", "fbt", "hidden batch token"),
    ("hidden", "btf", "batch token vocab"),
    ("hidden", "btf", "batch seq feature"),
    ("hidden", "btf", "batch query feature"),
    ("q_rope", "bhtd", "batch head token head_dim"),
    ("q_rope", "bthd", "batch token head head_dim"),
    ("q_rope", "bthd", "batch token kv_head head_dim"),
    ("q_rope", "tbhd", "token batch head head_dim"),
    ("q_rope", "dhtb", "head_dim head token batch"),
    ("probs", "bhtk", "batch head token key"),
    ("probs", "bhkt", "batch head key token"),
    ("probs", "hbtk", "head batch query key"),
]


@pytest.mark.parametrize(("kind", "order", "dims"), DECLARED)
def test_declared_axes_are_permuted(kind: str, order: str, dims: str) -> None:
    target = site(kind)
    letters = {"batch": "b", "token": "t", "feature": "f", "head": "h", "head_dim": "d", "key": "k"}
    own = [letters[dim] for dim in target.dims]
    original = numbers(target.shape)
    given_array = np.transpose(original, [own.index(letter) for letter in order])
    pair = paired(entry(given_array.shape, dims), target)
    np.testing.assert_array_equal(pair.read(given_array), original)
    assert bool(pair.steps) == (list(order) != own)


def test_a_transformation_is_said_in_words() -> None:
    pair = paired(entry((B, T, H, D), "batch token head head_dim"), site("q_rope"))
    assert pair.steps == ("batch token head head_dim → batch head token head_dim",)


def test_reading_needs_no_copy() -> None:
    array = numbers((T, B, F))
    assert np.shares_memory(paired(entry(array.shape, "token batch hidden"), site("hidden")).read(array), array)


def test_heads_are_split() -> None:
    array = numbers((B, T, H * D))
    pair = paired(entry(array.shape, "batch token hidden"), site("q_norm"))
    np.testing.assert_array_equal(pair.read(array), array.reshape(B, T, H, D))
    assert pair.steps == ("batch token head*head_dim → batch token head head_dim",)


def test_heads_are_split_and_moved() -> None:
    array = numbers((B, T, H * D))
    pair = paired(entry(array.shape, "batch token head*head_dim"), site("q_rope"))
    np.testing.assert_array_equal(pair.read(array), array.reshape(B, T, H, D).transpose(0, 2, 1, 3))


def test_heads_are_flattened() -> None:
    array = numbers((B, H, T, D))
    pair = paired(entry(array.shape, "batch head token head_dim"), site("q_proj"))
    np.testing.assert_array_equal(pair.read(array), array.transpose(0, 2, 1, 3).reshape(B, T, H * D))
    assert pair.steps


def test_rows_of_a_batch_may_lie_behind_one_another() -> None:
    array = numbers((B * T, F))
    pair = paired(entry(array.shape, "batch*token hidden"), site("hidden"))
    np.testing.assert_array_equal(pair.read(array), array.reshape(B, T, F))


@pytest.mark.parametrize("kind", ["hidden", "q_proj", "q_norm", "q_rope"])
def test_a_batch_of_one_may_be_left_out(kind: str) -> None:
    target = site(kind, batch=1)
    array = numbers(target.shape[1:])
    pair = paired(entry(array.shape, " ".join(target.dims[1:])), target)
    np.testing.assert_array_equal(pair.read(array), array[None])


def test_a_batch_of_two_may_not_be_left_out() -> None:
    assert isinstance(align(entry((T, F), "token hidden"), site("hidden"), D), Gap)


def test_wildcards_are_filled_where_only_one_axis_fits() -> None:
    array = numbers((T, B, F))
    pair = paired(entry(array.shape, "token _ _"), site("hidden"))
    np.testing.assert_array_equal(pair.read(array), array.transpose(1, 0, 2))


def test_a_wildcard_decides_between_equal_sizes() -> None:
    target = site("q_rope", head=4, token=4)
    array = numbers((B, 4, 4, D))
    with pytest.raises(AmbiguousLayoutError):
        align(entry(array.shape), target, D)
    with pytest.raises(AmbiguousLayoutError):
        align(entry(array.shape, "batch _ _ _"), target, D)
    np.testing.assert_array_equal(
        paired(entry(array.shape, "batch token head _"), target).read(array), array.transpose(0, 2, 1, 3)
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_undeclared_axes_are_told_apart_by_their_sizes(axes: tuple[int, ...]) -> None:
    original = numbers((B, T, F))
    array = np.transpose(original, axes)
    back = paired(entry(array.shape), site("hidden")).read(array)
    np.testing.assert_array_equal(back, original)


def test_undeclared_heads_are_told_apart_by_their_sizes() -> None:
    original = numbers((B, H, T, D))
    array = original.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(paired(entry(array.shape), site("q_rope")).read(array), original)


def test_axes_of_size_one_may_stand_anywhere() -> None:
    target = site("q_rope", batch=1, token=1)
    array = numbers((1, H, 1, D))
    np.testing.assert_array_equal(paired(entry(array.shape), target).read(array), array)
    assert paired(entry(array.shape), target).steps == ()
    np.testing.assert_array_equal(paired(entry((1, 1, H, D)), target).read(array.reshape(1, 1, H, D)), array)


def test_an_ambiguous_layout_is_refused_with_a_way_out() -> None:
    with pytest.raises(AmbiguousLayoutError) as caught:
        align(entry((B, F, F)), site("hidden", token=F), D)
    assert str(caught.value) == (
        "model.layers.0.hidden: shape (2, 7, 7) can be read as 'batch token feature' or 'batch feature token'. "
        "Declare its axes in the dump: parity.dims = {'model.layers.0.hidden': 'batch token feature'}."
    )


TURNED = "token batch hidden"


def test_what_fits_no_layout_is_a_gap() -> None:
    wanted = {"axes": ("batch", "token", "feature"), "sizes": (B, T, F)}
    long, turned = align(entry((B, T, F + 1)), site("hidden"), D), align(entry((B, T, F), TURNED), site("hidden"), D)
    assert long == Gap("misshapen", (B, T, F + 1), **wanted)
    assert turned == Gap("misshapen", (B, T, F), dims=tuple(TURNED.split()), **wanted)
    assert words.gap(long) == "shape (2, 5, 8) does not fit batch=2 token=5 feature=7"
    assert words.gap(turned) == f"shape (2, 5, 7) declared as {TURNED!r} does not fit batch=2 token=5 feature=7"
    for shape in [(), (B * T * F,), (B, T, F, 1, 1)]:
        assert isinstance(align(entry(shape), site("hidden"), D), Gap), shape


@pytest.mark.parametrize("head_dim", [None, 5])
def test_heads_whose_size_is_unknown_are_compared_whole(head_dim: int | None) -> None:
    array = numbers((B, T, H * D))
    pair = paired(entry(array.shape), site("q_proj"), head_dim)
    np.testing.assert_array_equal(pair.read(array), array)
    assert pair.steps == ()


FLAT = Site("model.layers.0.mlp.gate", ("batch*token", "feature"), (B * T, F), "float32", "model.layers.0.mlp.gate")


@pytest.mark.parametrize("dims", [None, "batch*token feature"])
def test_a_reference_that_flattens_its_batch_is_met_by_a_candidate_that_does(dims: str | None) -> None:
    array = numbers((B * T, F))
    pair = paired(entry(array.shape, dims), FLAT)
    np.testing.assert_array_equal(pair.read(array), array)
    assert pair.steps == ()


def test_a_reference_that_flattens_its_batch_is_met_by_a_candidate_that_does_not() -> None:
    array = numbers((1, T, F))
    one = Site(FLAT.name, FLAT.dims, (T, F), "float32", FLAT.module)
    pair = align(entry(array.shape), one, D, token=T)
    assert isinstance(pair, Pair)
    np.testing.assert_array_equal(pair.read(array), array[0])


# -- any layout ----------------------------------------------------------------------------------------------

SIZES = {name: st.integers(1, 5) for name in ("batch", "token", "head", "head_dim", "feature")}
LAYOUTS: list[tuple[Dims, Dims]] = [
    # the reference's dims, and its atoms
    (("batch", "token", "feature"), ("batch", "token", "feature")),
    (("batch", "token", "head*head_dim"), ("batch", "token", "head", "head_dim")),
    (("batch", "token", "head", "head_dim"), ("batch", "token", "head", "head_dim")),
    (("batch", "head", "token", "head_dim"), ("batch", "head", "token", "head_dim")),
    (("batch", "head", "token", "key"), ("batch", "head", "token", "key")),
]


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[Site, Dims, NDArray[Any], NDArray[Any], int]:
    """A site, the candidate's axes, the candidate's array, the same numbers as the reference has them, head_dim."""
    dims, atoms = draw(st.sampled_from(LAYOUTS))
    size = draw(st.fixed_dictionaries(SIZES))
    size["key"] = size["token"]
    original = numbers(tuple(size[atom] for atom in atoms))
    axes = [[atom] for atom in atoms]
    for first, second in (("head", "head_dim"), ("batch", "token")):
        if [first] in axes and [second] in axes and draw(st.booleans()):
            axes[axes.index([first])] = [first, second]
            axes.remove([second])
    if ["batch"] in axes and size["batch"] == 1 and draw(st.booleans()):
        axes.remove(["batch"])
    axes = draw(st.permutations(axes))
    order = [atom for axis in axes for atom in axis]
    missing = [atom for atom in atoms if atom not in order]
    moved = np.transpose(original, [atoms.index(atom) for atom in missing + order])
    array = moved.reshape([math.prod(size[atom] for atom in axis) for axis in axes])
    target = Site("s", dims, tuple(math.prod(size[a] for a in dim.split("*")) for dim in dims), "float32", "m")
    return target, tuple("*".join(axis) for axis in axes), array, original.reshape(target.shape), size["head_dim"]


@given(arrangements())
def test_every_declared_layout_is_read_back(
    arrangement: tuple[Site, Dims, NDArray[Any], NDArray[Any], int],
) -> None:
    target, axes, array, original, head_dim = arrangement
    pair = paired(entry(array.shape, " ".join(axes)), target, head_dim)
    np.testing.assert_array_equal(pair.read(array), original)
    if axes == target.dims:
        assert pair.steps == ()


@given(arrangements())
def test_an_undeclared_layout_is_read_right_or_refused(
    arrangement: tuple[Site, Dims, NDArray[Any], NDArray[Any], int],
) -> None:
    target, _axes, array, original, head_dim = arrangement
    try:
        pair = paired(entry(array.shape), target, head_dim)
    except AmbiguousLayoutError:
        return
    np.testing.assert_array_equal(pair.read(array), original)
