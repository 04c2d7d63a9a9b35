"""Peak memory of one step of the loss at a real vocabulary, printed as JSON; test_memory.py runs each way by itself.

`python -m tests.kernels.peak_memory WAY FILE` with WAY one of naive, linear_log_softmax, linear_grpo_loss; the loss and
gradients go to FILE.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch

from rethinker_kernels import grpo_loss, linear_grpo_loss, linear_selective_log_softmax

ROWS, WIDTH, VOCABULARY = 4096, 32, 151_936


def main(way: str, file: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).div_(8).requires_grad_()
    index = torch.randint(VOCABULARY, (ROWS,))
    old_logps, advantages = torch.full((ROWS,), -12.0), torch.randn(ROWS)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if way == "linear_grpo_loss":
        loss, *_ = linear_grpo_loss(hidden, weight, index, old_logps, advantages, normalizer=ROWS)
    else:
        if way == "naive":
            log_probs = (hidden @ weight.t()).log_softmax(-1)
            logps = log_probs.gather(-1, index[:, None])[:, 0]
        else:
            logps = linear_selective_log_softmax(hidden, weight, index)
        loss, _ = grpo_loss(logps, old_logps, advantages, normalizer=ROWS)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save((loss.detach(), hidden.grad, weight.grad), file)
    print(json.dumps({"gigabytes": (peak - before) / 1e9}))


if __name__ == "__main__":
    main(*sys.argv[1:])
