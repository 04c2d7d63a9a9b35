"""State files: what comes back is what was written, to the bit, and reading executes nothing."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rethinker.checkpoint.resume import frozen, random_state, read_state, set_random_state

VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))
KEYS = st.text(st.characters(codec="utf-8")).filter(lambda key: key != "__tensor__")
TREES = st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner))


@given(tree=TREES)
def test_any_tree_comes_back(tmp_path_factory, tree):
    """Numbers of any size, NaN, infinities, odd texts and keys, empty lists: repr for repr the same."""
    path = tmp_path_factory.mktemp("state") / "run"
    frozen(tree)(path)
    assert repr(read_state(path)) == repr(tree)


def test_tensors_come_back_to_the_bit(tmp_path):
    """Every type and shape, empty ones and ones that share memory; a name with a dot is a name."""
    base = torch.arange(6.0).view(2, 3)
    tree = {"a": [base, base.T, base[0]], "b.c": {"d": torch.tensor([math.nan, -0.0], dtype=torch.float64)}}
    tree |= {"empty": torch.zeros(0, 2, dtype=torch.int64), "bytes": torch.tensor([255], dtype=torch.uint8)}
    frozen(tree)(tmp_path / "rank_00000")
    back = read_state(tmp_path / "rank_00000")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.json", "rank_00000.safetensors"]
    flat = [*zip(tree["a"], back["a"], strict=True), (tree["empty"], back["empty"]), (tree["bytes"], back["bytes"])]
    flat.append((tree["b.c"]["d"].view(torch.int64), back["b.c"]["d"].view(torch.int64)))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in flat)


def test_a_foreign_file_is_an_error_not_code(tmp_path):
    """A pickle in the place of the tensors is refused, not loaded."""
    frozen({"x": torch.ones(1)})(tmp_path / "run")
    torch.save({"x": torch.ones(1)}, tmp_path / "run.safetensors")
    with pytest.raises(Exception, match="(?i)header"):
        read_state(tmp_path / "run")


def test_every_random_stream_goes_on(tmp_path):
    """Python, NumPy (with a cached normal) and torch continue as if nothing had been between."""

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()

    random.gauss(0, 1)
    np.random.randn(1)  # leaves the second of a pair behind
    frozen(random_state())(tmp_path / "r")
    expected = draw()
    draw()
    set_random_state(read_state(tmp_path / "r"))
    assert draw() == expected
