"""`algorithm.loss`: the shipped losses by name, a function of the user's own by its file, and what can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rethinker.algorithm import losses, objective
from rethinker.algorithm.objective import load_loss, loss_inputs, shipped_losses
from rethinker.config import AlgorithmConfig, ConfigError
from rethinker_kernels import grpo_loss, policy_loss
from rethinker_kernels.losses import SURROGATE_OPTIONS
from tests.algorithm.examples import packed, sample

CISPO = """
def cispo(logps, rows, clip_high):
    ratio = (logps.detach() - rows.old_logps).exp()
    return -ratio.clamp(max=1 + clip_high) * rows.advantages * logps
"""


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
    """Three lines of CISPO get the setting that their parameter is named like."""
    batch = packed([sample(1.0, length=3), sample(-0.5, length=6)])
    logps = (batch.old_logps + torch.linspace(-1, 1, 9, dtype=torch.float64)).requires_grad_()
    for clip_high in (0.1, 0.5):
        config = named(CISPO, "cispo", clip_high=clip_high)
        loss, _ = policy_loss(logps, **_without_nll(loss_inputs(load_loss(config), batch, config, 9.0)))
        (gradient,) = torch.autograd.grad(loss, logps)
        advantages = torch.tensor([1.0] * 3 + [-0.5] * 6, dtype=torch.float64)
        ratio = (logps.detach() - batch.old_logps).exp()
        torch.testing.assert_close(gradient, -ratio.clamp(max=1 + clip_high) * advantages / 9)


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
    assert not load_loss(named(CISPO, "cispo")).whole_sequences


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
    page = Path(__file__).parents[2] / "docs" / "losses.md"
    assert f"| `{name}` |" in page.read_text().partition("## The shipped losses")[2]


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


def test_a_setting_that_would_change_nothing(named):
    """A reference model is not loaded for a loss that does not take the KL's weight."""
    config = named("def f(logps, rows): return -logps * rows.advantages")
    config.kl_coef = 0.1
    with pytest.raises(ConfigError, match=r"no parameter kl_coef.* set algorithm\.kl_coef=0\.0"):
        load_loss(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grpoo", "give grpo, or path/to/file.py:function"),
        ("losses.py", "give grpo, or path/to/file.py:function"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
    ],
)
def test_a_loss_that_does_not_exist(spec, message):
    """The shipped ones are listed."""
    with pytest.raises(ConfigError, match=f"^algorithm.loss={spec}: {message}"):
        objective.load_loss(AlgorithmConfig(loss=spec))
