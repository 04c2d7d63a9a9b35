"""Data: questions from any source, their prompts and images."""
