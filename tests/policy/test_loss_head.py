"""The head of a model that caps its logits, as Gemma's do (final_logit_softcapping)."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from rethinker.config import PolicyConfig
from rethinker.policy.loading import load_model
from rethinker.policy.model import LossHead, Policy
from tests.policy.helpers import queries_of_every_kind, samples_for
from tests.policy.test_packing import compare

CAP = 0.5
"""Far below a tiny model's logits."""


@pytest.fixture
def capped_model():
    """A text model of transformers that caps what its head returns."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3TextConfig(vocab_size=97, num_key_value_heads=1, head_dim=32, final_logit_softcapping=CAP, **sizes)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


def test_it_is_the_cap_of_transformers(capped_model):
    """Log-probs, entropies and gradients from hidden states are those of transformers' own logits; the model that has
    this head caps its logits once, and not twice."""
    ids = torch.randint(97, (1, 24))
    hidden = capped_model.model(ids).last_hidden_state[0]
    want = capped_model(ids).logits[0]
    assert 0.9 * CAP < want.abs().max() <= CAP
    log_probs = (want / 0.7).log_softmax(-1)
    expected = log_probs[torch.arange(24), ids[0]], -(log_probs.exp() * log_probs).sum(-1)
    head = LossHead.around(capped_model.lm_head, CAP)
    found = head(hidden, ids[0], 0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = list(capped_model.parameters())
    gradients = [
        torch.autograd.grad(logps.sum() + 0.3 * entropies.sum(), weights) for logps, entropies in (found, expected)
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    capped_model.lm_head = head
    assert torch.equal(capped_model(ids).logits[0], want)


def test_a_policy_has_the_cap_of_its_model(tiny_folder, encoder, tmp_path):
    """Law 2 with a cap in the config of the language model: packing equals the capped forward of every sequence."""
    model, own = (load_model(tiny_folder, torch.float32) for _ in range(2))
    own.config.text_config.final_logit_softcapping = CAP
    policy = Policy(own, PolicyConfig(dtype="float32"))
    model.lm_head.register_forward_hook(lambda *given: CAP * (given[-1] / CAP).tanh())
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 1, 9, 3])
    logp_error, gradient_error = compare(samples, encoder, policy, model)
    assert logp_error <= 1e-5
    assert gradient_error <= 1e-5
