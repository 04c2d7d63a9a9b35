"""Curation: how often a model answers each question of a data set, and the questions worth training on."""
