"""Measurements of speed and memory, peers side by side; `results/` holds what they wrote."""
