"""A response in parts: what is appended lines up to the token, the experts of a mixture too."""

from __future__ import annotations

import numpy as np
import pytest

from rethinker.samples import Completion, Prompt
from rethinker.trajectory import Trajectory


def experts(start: int, end: int) -> np.ndarray:
    """Those of the positions [start, end) of the whole sequence, each another one."""
    return np.arange(start, end, dtype=np.int16)[:, None, None]


@pytest.mark.parametrize("kept", [3, 2, 0])
def test_parts_line_up(kept):
    """A turn, whole or cut, what was heard, and another turn: ids, log-probs, room, the next prompt, and the experts of
    every token but the last, each from the request that computed it."""
    made = Trajectory(Prompt("q", [1, 1, 2], [1, 2], ["image"]), longest=12)
    # vLLM says the experts of a request's prompt and of what it sampled but the last: marked by the request's number.
    made.say(Completion([10, 11, 12], [-1, -2, -3], "", "stop", experts=experts(0, 5)), kept)
    made.hear([20, 21, 21, 21], [20, 21], ["another"])
    before = 3 + kept + 4
    assert made.prompt.token_ids == [1, 1, 2, *[10, 11, 12][:kept], 20, 21, 21, 21] and made.tokens == kept + 4
    assert made.prompt.compact_ids == [1, 2, *[10, 11, 12][:kept], 20, 21] and made.prompt.images == [
        "image",
        "another",
    ]
    assert made.room == 12 - kept - 4
    made.say(Completion([30, 31], [-4, -5], "", "length", experts=1000 + experts(0, before + 1)))
    whole = made.completion("words")
    assert (
        whole.token_ids.tolist() == [*[10, 11, 12][:kept], 20, 21, 21, 21, 30, 31] and whole.finish_reason == "length"
    )
    assert np.isnan(whole.logprobs[kept : kept + 4]).all() and whole.logprobs[-2:].tolist() == [-4, -5]
    first = min(3 + kept, 5)  # positions that the first request had computed
    assert whole.experts[:, 0, 0].tolist() == [*range(first), *range(1000 + first, 1000 + before + 1)]
    made.forget_images()
    assert not made.prompt.images
