"""Evaluation: validation while training, benchmarks, and what rethinking at test time changes."""
