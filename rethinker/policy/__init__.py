"""The policy: model, packing, forward, the ZeRO-3 engine, and the embedded tiny model."""

from rethinker.runtime.quiet import hush
from rethinker.runtime.torchvision_cpu import make_importable

# Every module here imports transformers' processors, and they import torchvision.
make_importable()
hush()
