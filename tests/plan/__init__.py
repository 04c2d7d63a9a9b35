"""Tests of rethinker.plan."""
