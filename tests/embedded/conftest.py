"""The tiny model as the policy's tests have it."""

from tests.policy.conftest import encoder, model, policy, tiny_folder  # noqa: F401 (fixtures)
