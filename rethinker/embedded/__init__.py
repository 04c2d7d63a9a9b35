"""The embedded default: a tiny model, its tokenizer and warm-up, and data sets that come with installed packages."""
