"""Completions: arrays that are compared, copied and sent as values, at 8 bytes a token."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rethinker.samples import Completion, Rethought

INF = math.inf


def completion(**changes) -> Completion:
    fields = {"token_ids": [1, 151_935, 7], "logprobs": [-0.1, -INF, math.nan], "text": "x", "finish_reason": "stop"}
    return Completion(**fields | changes)


def test_sequences_become_arrays():
    """Ids int32 and log-probs fp32, from lists, tuples and wider arrays; -inf and NaN (law 12) stay what they are."""
    for given in (list, tuple, np.array):
        one = completion(
            token_ids=given([1, 2, 3]), logprobs=given([-0.1, -INF, math.nan]), trainer_logprobs=given([0.5])
        )
        assert (one.token_ids.dtype, one.logprobs.dtype, one.trainer_logprobs.dtype) == (
            np.int32,
            np.float32,
            np.float32,
        )
        assert one.logprobs[1] == -INF and math.isnan(one.logprobs[2]) and one.logprobs[0] == np.float32(-0.1)
    assert completion(token_ids=[], logprobs=[]).tokens == 0
    with pytest.raises(OverflowError):
        completion(token_ids=[1 << 31])


def test_completions_are_equal_by_value():
    """NaN equals NaN; any other field or number makes a difference, and none raises."""
    assert completion() == completion() == pickle.loads(pickle.dumps(completion())) == dataclasses.replace(completion())
    others = [
        completion(token_ids=[1, 151_935, 8]),
        completion(token_ids=[1, 151_935], logprobs=[-0.1, -INF]),
        completion(logprobs=[-0.1, -INF, -1.0]),
        completion(text="y"),
        completion(finish_reason="length"),
        completion(rethought=Rethought(1, 2, "a", 1, 2)),
        completion(trainer_logprobs=[0.0, 0.0, 0.0]),
    ]
    assert not any(a == b for i, a in enumerate([completion(), *others]) for b in others[i:])
    assert completion() != "x" and [completion()] == [completion()] and completion() in [completion()]


def test_a_token_takes_eight_bytes():
    """An id and a log-prob, in memory and on its way to another rank; text and the object itself are small beside."""
    one = completion(token_ids=np.arange(2048), logprobs=np.zeros(2048), text="")
    assert one.token_ids.nbytes + one.logprobs.nbytes == 8 * 2048
    assert len(pickle.dumps(one, protocol=pickle.HIGHEST_PROTOCOL)) < 8 * 2048 + 1000


def test_queries_alone_need_no_numpy():
    """A process that checks answers imports this module: it must not load numpy or torch for it."""
    code = "import sys, rethinker.samples; assert not {'numpy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
