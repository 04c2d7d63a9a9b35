"""Rollout: sampling responses from the current policy."""

from rethinker.runtime.torchvision_cpu import make_importable

# The engines import transformers' processors, and they import torchvision.
make_importable()
