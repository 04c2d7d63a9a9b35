"""Rollouts by vLLM servers of their own."""
