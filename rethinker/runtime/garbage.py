"""Python's garbage collector. What imports and models leave stays, and looking through it all takes half a second."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_USUAL = gc.get_threshold()


@contextmanager
def few_full_collections() -> Iterator[None]:
    """For a run's start, until `no_full_collections`: the usual ones take 2 s of its 17."""
    gc.set_threshold(*_USUAL[:2], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*_USUAL)


@contextmanager
def frozen() -> Iterator[None]:
    """Nothing that is there now is looked through, whatever a library asks for; also after this, until an unfreeze."""
    unfreeze, gc.unfreeze = gc.unfreeze, lambda: None
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze = unfreeze


@contextmanager
def no_full_collections() -> Iterator[None]:
    """What is there now lives as long as the run: no garbage collection looks through it. Others come as usual.

    Objects that the caller froze stay frozen.
    """
    some = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_USUAL)
    try:
        yield
    finally:
        if not some:
            gc.unfreeze()
