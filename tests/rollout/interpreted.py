"""vLLM's model runner V2 on a CPU: Triton's interpreter stands in for the CPU backend that Triton's wheel lacks.

All else is vLLM's own: it prepares its batches, and returns the experts of each token, by the code that runs on GPUs.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace


class Interpreter:
    """As far as a driver is asked of."""

    @staticmethod
    def is_active() -> bool:
        """Whether it can be used."""
        return True


def interpret_triton() -> None:
    """Before vLLM is imported, in a process of its own: it looks for Triton once."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=Interpreter, compiler=None)


if __name__ == "__main__":  # as `python -m rethinker`
    interpret_triton()
    from rethinker.cli import main

    sys.exit(main())
