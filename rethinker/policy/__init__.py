"""The policy: model, packing, forward, and the ZeRO-3 engine.

Every module here imports transformers and with it torchvision; libraries' messages that name nothing the user could
change are kept off the screen. What the user has set in the environment stays.
"""

import os
import warnings

import torch

from rethinker.runtime.torchvision_cpu import make_importable

make_importable()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no accelerator
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Of torch's collectives under DeepSpeed and vLLM: theirs to follow, not the user's.
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")

from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
