"""`algorithm.loss`: the shipped losses by name, a function of the user's own by its file, and what can be wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rethinker.algorithm import losses, objective
from rethinker.algorithm.objective import load_loss, loss_inputs, shipped_losses
from rethinker.config import AlgorithmConfig, ConfigError
from rethinker_kernels import GRPO_STATS, grpo_loss, policy_loss
from rethinker_kernels.losses import SURROGATE_OPTIONS, LossError
from tests.algorithm.examples import packed, sample

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
SPO = re.findall(r"```python\n(.+?)```", PAGE, flags=re.S)[0]  # the whole file that the page shows


@pytest.fixture
def named(tmp_path):
    """Writes a file and gives the settings that name its function f."""

    def write(source: str, function: str = "f", **settings) -> AlgorithmConfig:
        (tmp_path / "mine.py").write_text(source)
        return AlgorithmConfig(loss=f"{tmp_path / 'mine.py'}:{function}", **settings)

    return write


@pytest.mark.parametrize(
    "settings", [{}, {"clip_high": 0.05, "dual_clip": 1.1}, {"kl_coef": 0.2}, {"importance": "sequence"}]
)
def test_the_default_is_grpo_with_the_runs_options(settings):
    """Loss and statistics are those of rethinker_kernels.grpo_loss with every option of `algorithm`."""
    config = AlgorithmConfig(**settings)
    batch = packed([sample(1.0, length=3), sample(-0.5, length=6)])
    logps, ref = batch.old_logps + 0.3 * torch.randn(9, dtype=torch.float64), batch.old_logps - 0.1
    got = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, 4.0, ref)))
    options = {name: getattr(config, name) for name in SURROGATE_OPTIONS}
    given = {"cu_seqlens": batch.cu_seqlens, "weights": batch.weights, "mask": batch.loss_mask, "ref_logps": ref}
    want = grpo_loss(logps, batch.old_logps, batch.advantages, **given, **options, normalizer=4.0)
    assert got[0] == want[0] and torch.equal(got[1], want[1])


def _without_nll(inputs):
    assert inputs.pop("nll_weights") is None
    return inputs


def test_a_loss_of_the_users_own(named):
    """The page's example, SPO, gets the setting that its parameter is named like; its gradient is the one by hand."""
    batch = packed([sample(1.0, length=3), sample(-0.5, length=6)])
    logps = (batch.old_logps + torch.linspace(-1, 1, 9, dtype=torch.float64)).requires_grad_()
    for clip_high in (0.1, 0.5):
        config = named(SPO, "spo", clip_high=clip_high)
        loss, _ = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, 9.0)))
        (gradient,) = torch.autograd.grad(loss, logps)
        advantages = torch.tensor([1.0] * 3 + [-0.5] * 6, dtype=torch.float64)
        ratio = (logps.detach() - batch.old_logps).exp()
        slope = advantages.abs() * (ratio - 1) / clip_high - advantages  # in the ratio
        torch.testing.assert_close(gradient, slope * ratio / 9)


def test_a_file_may_hold_what_looks_up_its_module(named):
    """A dataclass with postponed annotations asks for the module of its class."""
    source = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Bound:
    high: float

def f(logps, rows): return -logps * rows.advantages * Bound(1.0).high
"""
    assert load_loss(named(source))


def test_a_loss_of_whole_responses_is_recognised(named):
    """Whether log-probs must come first is seen from the call of sequence_mean; a default fills what is no setting."""
    source = """
def f(logps, rows, scale=2.0):
    return -scale * rows.sequence_mean(logps - rows.old_logps).exp() * rows.advantages
"""
    assert load_loss(named(source)).whole_sequences
    assert not load_loss(named(SPO, "spo")).whole_sequences


def test_a_new_shipped_loss_is_named_by_its_name(monkeypatch):
    """A public function of losses.py with (logps, rows) can be named; nothing else has to know it."""

    def plain(logps, rows):
        return -rows.advantages * logps

    before = shipped_losses().keys()
    monkeypatch.setattr(losses, "plain", plain, raising=False)
    assert shipped_losses().keys() - before == {"plain"}
    assert load_loss(AlgorithmConfig(loss="plain")).function.func is plain


@pytest.mark.parametrize("name", shipped_losses())
def test_every_shipped_loss_passes_its_trial_and_is_explained(name):
    """What a user's own is tried on, shipped ones are, too; each has its row in the page about losses."""
    assert load_loss(AlgorithmConfig(loss=name))
    assert f"| `{name}` |" in PAGE.partition("## The shipped losses")[2]


RAISES = "def f(logps, rows): raise KeyError('no such thing')"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(logps, rows): return (logps + 0.5).log()", "its loss is not finite for ordinary log-probs"),
        ("def f(logps, rows): return (logps * 0).sqrt()", "its gradient is not finite for ordinary log-probs"),
        (
            "def f(logps, rows): return (logps * rows.advantages).sum()",
            r"must return a number per token, floating \[5\]",
        ),
        (
            "def f(logps, rows): return logps[:, None]",
            r"must return a number per token, .* not float32 \[5, 1\]",
        ),
        ("def f(logps, rows): return 1.0", "must return a number per token, .* not float"),
        ("def f(logps, rows): return -logps.detach() * rows.advantages", "no gradient; compute it from logps"),
        ("def f(logps, rows): return -rows.advantages + 0 * logps", "gradient is 0 for every token"),
        (
            "def f(logps, rows): return -(logps - logps.mean()) * rows.advantages",
            "gradient depends on which other tokens",
        ),
        ("import torch\ndef f(logps, rows): return -logps * torch.rand(len(logps))", "draw no random numbers"),
        ("def f(logps, rows): raise SystemExit(0)", "it fails on a batch of 9 tokens .SystemExit: 0"),
        (RAISES, "it fails on a batch of 9 tokens .KeyError: 'no such thing'"),
        ("def f(logps): return logps", r"it must take \(logps, rows\)"),
        ("def f(logps, rows, clip_hihg): return logps", "its parameter 'clip_hihg' is no setting of algorithm"),
        ("def g(logps, rows): return logps", "has no function 'f'; it has g"),
        ("import no_such_module", "fails to import .ModuleNotFoundError"),
    ],
)
def test_a_wrong_loss_is_one_clear_line(named, source, message):
    """Each names algorithm.loss, its value and what is wrong, before a model is loaded."""
    config = named(source)
    with pytest.raises(ConfigError, match=f"^algorithm.loss={config.loss}: .*{message}") as caught:
        load_loss(config)
    assert "\n" not in str(caught.value)


def test_a_loss_is_tried_where_it_will_run(named):
    """A constant of its own on the host is one line before the model is loaded, not an error in the first step."""
    config = named("import torch\ndef f(logps, rows): return -logps * rows.advantages * torch.ones(1)")
    assert load_loss(config)
    with pytest.raises(ConfigError, match=r"^algorithm\.loss=.*: it fails on a batch of 9 tokens .*device"):
        load_loss(config, "meta")  # for a GPU: tensors on another device


@pytest.mark.parametrize(
    ("loss", "name", "value", "default"),
    [
        ("cispo", "dual_clip", 3.0, "null"),
        ("sapo", "importance", "sequence", "token"),
        ("grpo", "tau_positive", 2.0, "1.0"),
        ("gmpo", "tau_negative", 2.0, "1.05"),
    ],
)
def test_a_setting_that_would_change_nothing(loss, name, value, default):
    """What only some losses take is refused with the others, with what to set instead."""
    with pytest.raises(ConfigError, match=rf"algorithm\.loss={loss}: it has no parameter {name}.*={default}"):
        load_loss(AlgorithmConfig(loss=loss, **{name: value}))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_term_beside_the_users_loss(named, estimator):
    """algorithm.kl_coef adds the KL's estimate to a loss that has no parameter for it, at every token that counts; a
    loss that has one adds its own, and gets nothing more."""
    batch = packed([sample(1.0, length=3), sample(0.0, length=6)])
    logps = batch.old_logps + torch.linspace(-1, 1, 9, dtype=torch.float64)
    ref = batch.old_logps + 0.3
    d = ref - logps
    kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[estimator]
    plain, own = "def f(logps, rows): return -logps * rows.advantages", "def f(logps, rows, kl_coef): return -logps"
    options = {"kl_coef": 0.3, "kl_estimator": estimator}
    for source, expected in ((plain, (0.3 * kl).sum() - logps[:3].sum()), (own, -logps.sum())):
        config = named(source, **options)
        got, stats = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, 9.0, ref)))
        torch.testing.assert_close(got, expected / 9)
        torch.testing.assert_close(stats[GRPO_STATS.index("kl_sum")], kl.sum())


def test_a_kl_term_hides_no_fault_of_the_loss(named):
    """With a KL term beside it, a loss without a gradient, or of another shape, is still one clear line."""
    for source, message in (
        ("def f(logps, rows): return -logps.detach() * rows.advantages", "no gradient; compute it from logps"),
        ("def f(logps, rows): return logps[:, None]", "must return a number per token"),
        ("def f(logps, rows): return 1.0", "must return a number per token, .* not float"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_loss(named(source, kl_coef=0.1))
    changes = "def f(logps, rows): return -logps * rows.advantages if len(logps) != 4 else logps.sum()"
    config = named(changes, kl_coef=0.1)
    batch = packed([sample(1.0, length=4)])
    with pytest.raises(LossError, match="must return a number per token"):
        inputs = loss_inputs(load_loss(config), batch, config, 4.0, batch.old_logps)
        policy_loss(batch.old_logps, **_without_nll(inputs))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grpoo", "give cispo, gmpo, grpo, sapo, or path/to/file.py:function"),
        ("losses.py", "give cispo, gmpo, grpo, sapo, or path/to/file.py:function"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
    ],
)
def test_a_loss_that_does_not_exist(spec, message):
    """The shipped ones are listed."""
    with pytest.raises(ConfigError, match=f"^algorithm.loss={spec}: {message}"):
        objective.load_loss(AlgorithmConfig(loss=spec))
