"""Evaluation: validation while training, benchmarks, and what test-time rethinking changes."""

from typing import Literal

Mode = Literal["normal", "forced", "oracle"]
"""Plain greedy answers; a second pass after every first answer; only after wrong ones (an upper bound)."""
