"""A measurement says what it ran on, and nothing about who ran it or where."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

from benchmarks.machine import cores, describe


def test_the_machine_is_described_without_names():
    """CPU, cores, versions and commit are there; host, user and folders are not."""
    machine = describe()
    text = json.dumps(machine)
    assert machine["cpu"]
    assert machine["cores"] == cores() == len(os.sched_getaffinity(0))
    assert machine["memory_gb"] > 0
    assert machine["versions"]["torch"] == metadata.version("torch")
    assert set(machine) == {"cpu", "cores", "memory_gb", "gpu", "driver", "os", "python", "versions", "commit"}
    assert not any(str(folder) in text for folder in (Path.home(), Path.cwd()))
