"""Freed host memory goes back to the operating system."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from rethinker.run import return_free_memory


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_gaps_in_the_heap_are_given_back():
    """Every second of many small buffers is freed: the heap keeps its size until the free pages are returned."""
    buffers = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each: below malloc's threshold for its own pages
    del buffers[::2]
    before = psutil.Process().memory_info().rss
    return_free_memory()
    assert before - psutil.Process().memory_info().rss > 60 * 2**20
    assert buffers[0].sum() == 16_000
