"""A function of the user's own, which a setting names as `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, one_line


def user_file(setting: str, spec: str, shipped: Iterable[str]) -> tuple[Path, str]:
    """The file and the function's name in `path/to/file.py:function`, which a setting has in place of a shipped name.

    Raises:
        ConfigError: it is no such text, or there is no such file.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"{setting}={spec}: give {', '.join(sorted(shipped))}, or path/to/file.py:function")
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise ConfigError(f"{setting}={spec}: there is no file {path}")
    return path, name


def user_function(setting: str, spec: str, shipped: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that a setting names: one of ours by its name, or one in a file. Arguments as in `user_file`.

    Raises:
        ConfigError: no such name, file or function, or a file that fails to import.
    """
    if spec in shipped:
        return shipped[spec]
    path, name = user_file(setting, spec, shipped)
    module_spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look a class's module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_spec.name]
        raise ConfigError(f"{setting}={spec}: {path} fails to import ({one_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [(n, v) for n, v in vars(module).items() if getattr(v, "__module__", None) == module_spec.name]
        names = [n for n, value in own if inspect.isfunction(value) or inspect.isclass(value)]
        raise ConfigError(f"{setting}={spec}: {path} has no function {name!r}; it has {', '.join(names) or 'none'}")
    return function
