"""SumTree: exact sums, exact probabilities, and the statistical tests of law 9, which must notice planted faults."""

from __future__ import annotations

import io
import itertools
import math
import random

import pytest
import scipy.stats
import torch

from rethinker_kernels import SumTree, sum_tree

ALARM = 1e-6
"""A p-value below this is a fault. Seeds are fixed, so a sound sampler passes always."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(priorities, alpha: float = 1.0) -> SumTree:
    priorities = torch.as_tensor(priorities, dtype=torch.float64)
    tree = SumTree(len(priorities), alpha=alpha)
    tree.update(torch.arange(len(priorities)), priorities)
    return tree


def counts(tree: SumTree, draws: int, seed: int = 0) -> torch.Tensor:
    """How often each slot comes in so many draws [capacity]."""
    source, total = generator(seed), torch.zeros(tree.capacity, dtype=torch.int64)
    for _ in range(draws // 100_000):
        total += tree.sample(100_000, generator=source).bincount(minlength=tree.capacity)
    return total


def g_test(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of the log-likelihood ratio test; no draws where the probability is 0 are required, not tested."""
    possible = probabilities > 0
    assert observed[~possible].eq(0).all()
    observed, expected = observed[possible].double(), probabilities[possible].double()
    expected = expected / expected.sum() * observed.sum()
    return scipy.stats.power_divergence(observed.numpy(), expected.numpy(), lambda_="log-likelihood").pvalue


def parents_are_exact(tree: SumTree) -> bool:
    """Whether every node equals the sum of its 32 children, added as Python integers."""
    for children, parents in itertools.pairwise(tree._levels):
        blocks = children.view(-1, 32).tolist()
        if parents[: len(blocks)].tolist() != [sum(block) for block in blocks] or parents[len(blocks) :].any():
            return False
    return True


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


def test_24_bit_uniforms_are_noticed(monkeypatch):
    """Random numbers are finer than fp32's 24 bits: of 3,050,402 equal slots those would reach half 6/5 as often."""
    n = 3_050_402  # 2^24 / n = 5.5
    edges = torch.arange(n + 1, dtype=torch.float64) * (2**24 / n)
    dense = edges.ceil().diff() > 5.5  # slots that hold 6 of the 2^24 values, the others hold 5
    tree = filled(torch.ones(n))
    expected = torch.tensor([n - int(dense.sum()), int(dense.sum())])

    def pooled() -> torch.Tensor:
        return dense[tree.sample(100_000, generator=generator())].long().bincount(minlength=2)

    assert g_test(pooled(), expected) > ALARM
    fine = sum_tree._random_63
    monkeypatch.setattr(sum_tree, "_random_63", lambda *args: fine(*args) >> 39 << 39)
    assert g_test(pooled(), expected) < ALARM


def test_the_random_number_maps_to_the_slot_by_integer_arithmetic():
    """The product's high word is exact over the whole 63-bit range, checked against Python integers."""
    numbers = random.Random(0)
    edge = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**62 - 1]
    xs = [*edge, 2**63 - 1, 2**62, *(numbers.getrandbits(63) for _ in range(200))]
    ys = [*edge, 2**62, *(numbers.getrandbits(62) for _ in range(100))]
    pairs = list(itertools.product(xs, ys))
    got = sum_tree._multiply_high(torch.tensor([x for x, _ in pairs]), torch.tensor([y for _, y in pairs]))
    assert got.tolist() == [x * y >> 63 for x, y in pairs]


@pytest.mark.parametrize("capacity", [1, 2, 31, 32, 33, 1024, 1025, 40_000])
def test_every_unit_of_weight_belongs_to_one_slot(capacity, monkeypatch):
    """The smallest and largest random number of each slot's interval lead to that slot, at every depth of tree."""
    numbers = random.Random(capacity)
    tree = SumTree(capacity)
    chosen = sorted({0, capacity - 1, *(numbers.randrange(capacity) for _ in range(50))})
    tree.update(torch.tensor(chosen), torch.tensor([numbers.uniform(1e-6, 2.0) for _ in chosen], dtype=torch.float64))
    ends = list(itertools.accumulate(tree._levels[0][chosen].tolist()))
    total = ends[-1]
    first = [-(-(start << 63) // total) for start in [0, *ends[:-1]]]  # smallest x with x * total >> 63 >= start
    last = [-(-(end << 63) // total) - 1 for end in ends]
    for numbers_63 in (first, last):
        monkeypatch.setattr(sum_tree, "_random_63", lambda n, *_, x=numbers_63: torch.tensor(x))
        assert tree.sample(len(chosen), generator=None).tolist() == chosen


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
    tree.update(torch.arange(capacity), torch.full((capacity,), math.nextafter(2.0**16, 0), dtype=torch.float64))
    total = tree._levels[-1].item()
    assert parents_are_exact(tree) and capacity * (2**16 - 1) << tree.fraction_bits < total < 2**62
    drawn = tree.sample(100, generator=generator())
    assert drawn.min() >= 0 and drawn.max() < capacity


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
    for _ in range(20_000):
        seen[pairs.index(tuple(tree.sample(2, generator=source, replacement=False).tolist()))] += 1
    expected = torch.tensor([weights[i] / 7 * weights[j] / (7 - weights[i]) for i, j in pairs])
    assert g_test(seen, expected) > ALARM


def test_without_replacement_returns_each_slot_once():
    """As many draws as slots give a permutation; one more is an error that says how many there are."""
    tree = filled([1.0] * 50 + [0.0] * 14)
    assert sorted(tree.sample(50, generator=generator(), replacement=False).tolist()) == list(range(50))
    with pytest.raises(ValueError, match="only 50 slots"):
        tree.sample(51, generator=generator(), replacement=False)


@pytest.mark.parametrize("replacement", [True, False])
def test_an_empty_tree_cannot_be_drawn_from(replacement):
    """All weights 0: a clear error, unless nothing was asked for."""
    tree = SumTree(100)
    with pytest.raises(ValueError, match="every weight in the tree is 0"):
        tree.sample(1, generator=generator(), replacement=replacement)
    assert tree.sample(0, generator=generator(), replacement=replacement).shape == (0,)
    with pytest.raises(ValueError, match=r"^n=-1"):
        tree.sample(-1, generator=generator())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9, 2.0**16])
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


@pytest.mark.parametrize(
    ("capacity", "alpha", "name"), [(0, 1.0, "capacity"), (1, -1.0, "alpha"), (1, math.inf, "alpha")]
)
def test_wrong_settings_are_named(capacity, alpha, name):
    """Out-of-range capacity and alpha are refused."""
    with pytest.raises(ValueError, match=f"^{name}"):
        SumTree(capacity, alpha=alpha)
