"""SumTree: exact sums, exact probabilities, and statistical tests that must notice planted faults."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch

from rethinker_kernels import SumTree
from tests.kernels.sum_trees import (
    ALARM,
    counts,
    dense_slots,
    filled,
    g_test,
    generator,
    parents_are_exact,
    require_compiler,
)


@pytest.fixture(autouse=True)
def compiler():
    require_compiler()


PRIORITIES = [0.0, 1.0, 0.37, 0.0, 2.5, 1.0, 1e-3, 0.9]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_draws_follow_priority_to_the_alpha(alpha):
    """Law 9: P(j) = p_j^alpha / sum; alpha = 0 is uniform over priorities above 0; priority 0 never comes."""
    expected = torch.tensor([p**alpha if p else 0.0 for p in PRIORITIES], dtype=torch.float64)
    assert g_test(counts(filled(PRIORITIES, alpha), 1_000_000), expected) > ALARM


def test_a_planted_bias_of_two_percent_is_noticed():
    """The test above has the power to see one priority that is 2% too large."""
    biased = [p * 1.02 if i == 4 else p for i, p in enumerate(PRIORITIES)]
    assert g_test(counts(filled(biased), 1_000_000), torch.tensor(PRIORITIES)) < ALARM


def test_large_tree_by_priority_and_by_position():
    """In 200,000 slots with 4 priorities, draws pooled by priority and by position (blocks, lanes) are as expected."""
    n = 200_000
    kind = torch.randint(4, (n,), generator=generator(1))
    priorities = torch.tensor([0.0, 0.2, 1.0, 3.0], dtype=torch.float64)[kind]
    observed = counts(filled(priorities), 1_000_000)
    for pools in (kind, torch.arange(n) // 6250, torch.arange(n) % 32):
        size = int(pools.max()) + 1
        pooled = torch.zeros(size, dtype=torch.int64).index_add(0, pools, observed)
        assert g_test(pooled, torch.zeros(size, dtype=torch.float64).index_add(0, pools, priorities)) > ALARM


def test_random_numbers_are_finer_than_24_bits():
    """3,050,402 equal slots come equally often; 24-bit numbers reach half of them 6/5 as often (see test_csrc.py)."""
    dense = dense_slots(3_050_402)
    tree = filled(torch.ones(len(dense)))
    observed = dense[tree.sample(100_000, generator=generator())].long().bincount(minlength=2)
    assert g_test(observed, dense.long().bincount()) > ALARM


def test_parents_stay_exact_after_a_million_updates():
    """After 10^6 mixed updates every parent is the sum of its children bit for bit, and every leaf its last write."""
    capacity, source = 5_000, generator(3)
    tree, last_write = SumTree(capacity, alpha=0.7), {}
    for _ in range(1000):
        indices = torch.randint(capacity, (1000,), generator=source)
        scales = 10.0 ** torch.randint(-12, 6, (1000,), generator=source).double()
        priorities = torch.rand(1000, generator=source, dtype=torch.float64) * scales
        priorities[torch.rand(1000, generator=source) < 0.3] = 0
        tree.update(indices, priorities)
        last_write |= dict(zip(indices.tolist(), priorities.tolist(), strict=True))
    assert parents_are_exact(tree)
    fresh = SumTree(capacity, alpha=0.7)
    fresh.update(torch.tensor(list(last_write)), torch.tensor(list(last_write.values()), dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(tree._levels, fresh._levels, strict=True))
    tree.update(torch.arange(capacity), torch.zeros(capacity))
    assert not any(level.any() for level in tree._levels)


def test_the_last_of_duplicate_writes_holds():
    """In one update that names a slot several times, its last priority counts, whatever stands between."""
    tree = SumTree(40)
    tree.update(torch.tensor([5, 39, 5, 7, 5, 39]), torch.tensor([9.0, 1.0, 8.0, 2.0, 0.5, 3.0]))
    assert tree.total.item() == 0.5 + 2.0 + 3.0
    torch.testing.assert_close(
        tree.probability(torch.tensor([5, 7, 39, 0])), torch.tensor([0.5, 2.0, 3.0, 0.0], dtype=torch.float64) / 5.5
    )


@pytest.mark.parametrize("capacity", [1, 1000, 1 << 20])
def test_weights_neither_vanish_nor_overflow(capacity):
    """The smallest priority keeps a weight of one unit; a tree full of the largest ones sums without overflow."""
    tree = SumTree(capacity)
    tree.update(torch.tensor([0]), torch.tensor([5e-324], dtype=torch.float64))
    assert tree.sample(3, generator=generator()).tolist() == [0, 0, 0]
    tree.update(torch.arange(capacity), torch.full((capacity,), math.nextafter(2.0**27, 0), dtype=torch.float64))
    total = tree._levels[-1].item()
    assert parents_are_exact(tree) and capacity * (2**27 - 1) << tree.fraction_bits < total < 2**62
    drawn = tree.sample(100, generator=generator())
    assert drawn.min() >= 0 and drawn.max() < capacity


@pytest.mark.parametrize(("capacity", "unit"), [(1 << 14, 2.0**-21), (1 << 20, 2.0**-15)])
def test_small_weights_keep_their_share_beside_large_ones(capacity, unit):
    """Beside a priority of 1e8 every other one is off by half a unit at most, and none falls below a unit."""
    priorities = 10.0 ** torch.linspace(-8, 8, capacity, dtype=torch.float64)
    tree = filled(priorities)
    weights = tree._levels[0].double() * 2.0**-tree.fraction_bits  # exact: below 2^53 units
    assert (weights - priorities).abs()[priorities >= unit].max() <= unit / 2
    assert weights.min() == unit and weights.max() == 1e8


def test_accepts_is_what_update_takes():
    """`accepts` knows beforehand which priorities are refused; at the very bound it may refuse what update takes."""
    tree, source = SumTree(1, alpha=0.7), torch.tensor([0])
    edge = 2.0 ** (27 / 0.7)
    near = [edge * (1 + k * 1e-14) for k in range(-4, 5)]
    candidates = [0.0, 1.0, edge * (1 - 1e-11), -1.0, math.nan, math.inf, edge * (1 + 1e-11), *near]
    taken = []
    for priority in torch.tensor(candidates, dtype=torch.float64):
        try:
            tree.update(source, priority[None])
        except ValueError:
            taken.append(False)
        else:
            taken.append(True)
    accepted = tree.accepts(torch.tensor(candidates, dtype=torch.float64)).tolist()
    assert accepted[:7] == taken[:7] == [True] * 3 + [False] * 4
    assert all(took or not accepts for took, accepts in zip(taken, accepted, strict=True)) and len(set(taken[7:])) == 2


@pytest.mark.parametrize("replacement", [True, False])
def test_weight_zero_is_never_drawn(replacement):
    """With one slot in a hundred above 0, at block edges too, nothing else is ever returned."""
    tree, alive = SumTree(10_000), torch.tensor([0, 31, 32, 1023, 1024, 9_999])
    tree.update(torch.arange(10_000), torch.ones(10_000))
    tree.update(torch.arange(10_000), torch.zeros(10_000))
    tree.update(alive, torch.tensor([1e-9, 5.0, 1e-9, 3.0, 1e-3, 1e-9]))
    n = 100_000 if replacement else len(alive)
    assert torch.isin(tree.sample(n, generator=generator(), replacement=replacement), alive).all()


def test_without_replacement_is_successive_drawing():
    """P(i then j) = w_i / W * w_j / (W - w_i), and no slot twice."""
    weights = [1.0, 2.0, 4.0, 0.0]
    tree, source = filled(weights), generator()
    pairs = list(itertools.permutations(range(3), 2))
    seen = torch.zeros(len(pairs), dtype=torch.int64)
    for _ in range(5_000):
        seen[pairs.index(tuple(tree.sample(2, generator=source, replacement=False).tolist()))] += 1
    expected = torch.tensor([weights[i] / 7 * weights[j] / (7 - weights[i]) for i, j in pairs])
    assert g_test(seen, expected) > ALARM


def test_without_replacement_returns_each_slot_once():
    """As many draws as slots give a permutation; one more is an error that says how many there are."""
    tree = filled([1.0] * 50 + [0.0] * 14)
    assert sorted(tree.sample(50, generator=generator(), replacement=False).tolist()) == list(range(50))
    with pytest.raises(ValueError, match="only 50 slots"):
        tree.sample(51, generator=generator(), replacement=False)


def test_without_replacement_after_many_rounds():
    """Weights so unequal that most draws repeat: each slot's place in the order has its exact probability."""
    weights = [1000.0, 100.0, 10.0, 1.0]
    tree, source = filled(weights), generator()
    orders = list(itertools.permutations(range(4)))
    seen = torch.zeros(len(orders), dtype=torch.int64)
    for _ in range(5_000):
        seen[orders.index(tuple(tree.sample(4, generator=source, replacement=False).tolist()))] += 1
    expected = [math.prod(weights[o[k]] / sum(weights[j] for j in o[k:]) for k in range(4)) for o in orders]
    frequent = torch.tensor(expected) > 5e-3  # the rest is pooled: a G-test needs a few expected counts each
    pooled = torch.cat([seen[frequent], seen[~frequent].sum()[None]])
    chances = torch.tensor(expected, dtype=torch.float64)
    assert g_test(pooled, torch.cat([chances[frequent], chances[~frequent].sum()[None]])) > ALARM


def test_without_replacement_leaves_the_tree_as_it_was():
    """Slots that a draw takes out come back with their weights, also when there are too few of them."""
    tree = filled(torch.rand(2000, generator=generator(4)) * (torch.arange(2000) % 3 > 0))
    before = tree._nodes.clone()
    tree.sample(1200, generator=generator(), replacement=False)
    with pytest.raises(ValueError, match="only 1333 slots"):
        tree.sample(1334, generator=generator(), replacement=False)
    assert torch.equal(tree._nodes, before)


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_are_a_function_of_seed_and_offset(replacement):
    """The same (seed, offset) gives the same draws and is not written to; another seed or offset gives others."""
    tree = filled(torch.ones(10_000))
    keys = [torch.tensor(key) for key in ((1, 2), (1, 3), (2, 2), (-1, 2), (1, -(1 << 63)))]
    draws = [tree.sample(100, generator=key, replacement=replacement) for key in keys]
    for key, drawn in zip(keys, draws, strict=True):
        assert torch.equal(tree.sample(100, generator=key.clone(), replacement=replacement), drawn)
    assert keys[0].tolist() == [1, 2]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_offsets_are_independent_streams():
    """Draws of neighbouring offsets, and draws of one call, do not depend on each other: pairs are uniform."""
    tree = filled(torch.ones(10))
    draws = torch.stack([tree.sample(100_000, generator=torch.tensor([0, offset])) for offset in (0, 1)])
    uniform = torch.ones(100)
    assert g_test((10 * draws[0] + draws[1]).bincount(minlength=100), uniform) > ALARM
    assert g_test((10 * draws[0, ::2] + draws[0, 1::2]).bincount(minlength=100), uniform) > ALARM


@pytest.mark.parametrize(
    ("source", "message"),
    [(torch.zeros(2), "^generator: must be int64"), (torch.zeros(3, dtype=torch.int64), "^generator: must be int64")],
)
def test_wrong_seed_and_offset_are_named(source, message):
    """A tensor that is not int64 [2] is refused."""
    with pytest.raises(ValueError, match=message):
        filled([1.0]).sample(1, generator=source)


@pytest.mark.parametrize("replacement", [True, False])
def test_an_empty_tree_cannot_be_drawn_from(replacement):
    """All weights 0: a clear error, unless nothing was asked for."""
    tree = SumTree(100)
    with pytest.raises(ValueError, match="every weight in the tree is 0"):
        tree.sample(1, generator=generator(), replacement=replacement)
    assert tree.sample(0, generator=generator(), replacement=replacement).shape == (0,)
    with pytest.raises(ValueError, match=r"^n=-1"):
        tree.sample(-1, generator=generator())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9, 2.0**27])
def test_refused_priorities_name_the_slot_and_change_nothing(bad):
    """NaN, infinite, negative and too large priorities raise, naming the index; the tree stays as it was."""
    tree = filled([1.0, 2.0, 3.0])
    before = [level.clone() for level in tree._levels]
    with pytest.raises(ValueError, match="at index 2 must be"):
        tree.update(torch.tensor([0, 2]), torch.tensor([5.0, bad]))
    assert all(torch.equal(a, b) for a, b in zip(before, tree._levels, strict=True))


@pytest.mark.parametrize(
    ("indices", "priorities", "message"),
    [
        (torch.tensor([3]), torch.ones(1), r"indices: 3 is outside \[0, 3\)"),
        (torch.tensor([-1]), torch.ones(1), "indices: -1"),
        (torch.tensor([0.0]), torch.ones(1), "^indices: must be int64"),
        (torch.tensor([0]), torch.ones(2), "^priorities: must be floating"),
        (torch.tensor([0]), torch.tensor([1]), "^priorities: must be floating"),
        (torch.tensor([0, 1, 1]), torch.tensor([1.0, -2.0, math.nan]), "^priorities: -2.0 at index 1 "),
    ],
)
def test_wrong_update_arguments_are_named(indices, priorities, message):
    """An index outside the tree (padding included) and wrong types are refused."""
    with pytest.raises(ValueError, match=message):
        SumTree(3).update(indices, priorities)


def test_an_update_of_nothing_is_legal():
    """No indices change nothing."""
    tree = filled([1.0])
    tree.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert tree.total.item() == 1


@pytest.mark.parametrize("replacement", [True, False])
def test_a_saved_tree_draws_the_same_stream(replacement):
    """A tree restored from its saved state continues with the same draws, and its parents are the sums again."""
    tree, source = filled(torch.rand(3_000, generator=generator(5)), alpha=0.6), generator()
    tree.sample(10, generator=source)
    file = io.BytesIO()
    torch.save({"tree": tree.state_dict(), "rng": source.get_state()}, file)
    expected = tree.sample(500, generator=source, replacement=replacement)
    file.seek(0)
    state = torch.load(file)
    restored, resumed = SumTree(3_000, alpha=0.6), torch.Generator()
    restored.update(torch.arange(3_000), torch.ones(3_000))
    restored.load_state_dict(state["tree"])
    resumed.set_state(state["rng"])
    assert torch.equal(restored.sample(500, generator=resumed, replacement=replacement), expected)
    assert parents_are_exact(restored)


def test_every_layout_of_arguments_is_read_as_its_values():
    """Strided, half-precision and gradient-carrying priorities, and strided indices, mean what they show."""
    indices = torch.tensor([0, 9, 1, 9, 2, 9])[::2]
    for values in (torch.tensor([1.0, 9, 2, 9, 4, 9])[::2], torch.tensor([1.0, 2, 4]).half().requires_grad_()):
        tree = SumTree(3)
        tree.update(indices, values)
        assert (tree._levels[0][:3] >> tree.fraction_bits).tolist() == [1, 2, 4]


def test_a_saved_state_is_a_copy():
    """Later updates do not reach a state that was taken before."""
    tree = filled([1.0, 2.0])
    state = tree.state_dict()
    tree.update(torch.tensor([0]), torch.tensor([7.0]))
    tree.load_state_dict(state)
    assert tree.total.item() == 3


def test_a_state_of_another_tree_is_refused():
    """Capacity and alpha must agree, and the message says which does not."""
    state = SumTree(4, alpha=0.5).state_dict()
    with pytest.raises(ValueError, match=r"^capacity: the saved tree has 4, this one 5"):
        SumTree(5, alpha=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^alpha: the saved tree has 0.5, this one 1.0"):
        SumTree(4).load_state_dict(state)


def test_a_state_in_other_units_is_refused():
    """A tree that another release saved, whose weights would mean something else, is refused and not misread."""
    tree = SumTree(4)
    state = tree.state_dict() | {"fraction_bits": 44}
    for other in (state, {k: v for k, v in state.items() if k != "fraction_bits"}):
        with pytest.raises(ValueError, match=f"^fraction_bits: .* this one {tree.fraction_bits}"):
            tree.load_state_dict(other)


@pytest.mark.parametrize(
    ("capacity", "alpha", "name"), [(0, 1.0, "capacity"), (1, -1.0, "alpha"), (1, math.inf, "alpha")]
)
def test_wrong_settings_are_named(capacity, alpha, name):
    """Out-of-range capacity and alpha are refused."""
    with pytest.raises(ValueError, match=f"^{name}"):
        SumTree(capacity, alpha=alpha)
