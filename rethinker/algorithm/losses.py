"""The losses that ship. `algorithm.loss` names one, or a function like them as `path/to/file.py:function`.

A loss takes the log-probs of C tokens and what is known of them, and returns a number per token:

    def cispo(logps, rows, clip_high):  # arXiv 2506.13585
        ratio = (logps.detach() - rows.old_logps).exp()
        return -ratio.clamp(max=1 + clip_high) * rows.advantages * logps

`rows` is a `Rows`: old_logps, advantages, ref_logps, mask, weights [C] and `sequence_mean`. Further parameters are
settings: one that is named like a setting of `algorithm` (clip_high) gets its value. Which tokens count, their
weights, the aggregation, the normalizer, the supervised term and the statistics are not the loss's (`objective.py`).
The tokens may be any part of a batch, so a token's loss may depend on others through `rows.sequence_mean` only.

Every public function here whose first parameters are (logps, rows) can be named. `grpo` is written in
rethinker_kernels, whose Triton row kernel, its fast path on a GPU, is tested against it.
"""

from __future__ import annotations

from rethinker_kernels.losses import Rows, grpo

__all__ = ["Rows", "grpo"]
