"""The policy: model, packing, forward, and the ZeRO-3 engine."""

from rethinker.runtime.quiet import hush
from rethinker.runtime.torchvision_cpu import make_importable

# Every module here imports transformers' processors, and they import torchvision.
make_importable()
hush()
