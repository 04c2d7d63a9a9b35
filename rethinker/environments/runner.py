"""Arrives with the environments."""


class Runner: ...
