"""From a recipe and overrides to checked settings: reading, merging, and errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from time import strftime
from typing import Any

import yaml

from rethinker.checks import check_geometry, check_resources
from rethinker.config import Config, ConfigError

# Far beyond any recipe.
LONGEST_YAML = 2**20
DEEPEST_RECIPE = 32


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the settings: its dotted key, type, default and documentation."""

    key: str
    type: Any
    default: Any
    doc: str

    @property
    def is_mapping(self) -> bool:
        return self.type is dict or typing.get_origin(self.type) is dict


def load_config(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Config:
    """Settings of a run, checked: keys, types, geometry, and what they need of this machine.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `["--train.max_steps", "20"]` (or `--train.max_steps=20`) as on the command line, or a mapping,
            dotted or nested: `{"train.max_steps": 20}`.

    Raises:
        ConfigError: naming the setting, its value, and what would work. Nothing has been written or loaded then.
    """
    config = resolve_config(recipe, overrides)
    check_resources(config)
    return config


def resolve_config(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Config:
    """As `load_config`, without looking at this machine's disk, models and packages."""
    values: dict[str, Any] = {}
    for path in recipe_paths(recipe):
        _merge(values, _read_recipe(path))
    given = overrides or {}
    _merge(values, given if isinstance(given, Mapping) else _read_arguments(given))
    config = _convert(values)
    if config.run.name is None:
        if config.resume is not None:
            raise ConfigError(
                f"resume={config.resume} needs run.name: the run to continue, as --run.name NAME; or give its settings "
                "as the recipe, RUN/config.yaml"
            )
        stem = "-".join(Path(part).stem for part in str(recipe).split("+"))
        config.run.name = f"{stem}-{strftime('%Y%m%d-%H%M%S')}"
    check_geometry(config)
    return config


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return _yaml_files("recipes")


def presets() -> dict[str, Path]:
    """What can be added to a recipe as RECIPE+PRESET, by name."""
    return _yaml_files("recipes/presets")


def _yaml_files(folder: str) -> dict[str, Path]:
    files = (Path(str(resources.files("rethinker"))) / folder).glob("*.yaml")
    return {path.stem: path for path in sorted(files)}


def recipe_paths(recipe: str | Path) -> list[Path]:
    """The files of a recipe, `NAME` or `NAME+PRESET+...`, in the order in which later settings replace earlier ones.

    A name is that of a shipped recipe or preset, or a YAML file. A recipe's `base` comes before it.

    Raises:
        ConfigError: naming the part that does not exist, and those that do.
    """
    is_file = os.path.isfile(os.path.expanduser(recipe))  # unlike Path.is_file no error on a name no file can have
    parts = [str(recipe)] if is_file else str(recipe).split("+")
    paths: list[Path] = []
    for number, part in enumerate(parts):
        path = _recipe_path(part, {**presets(), **shipped_recipes()} if number else shipped_recipes())
        base = read_yaml_file(path, f"recipe {path}")
        name = base.get("base") if isinstance(base, dict) else None
        if name is not None and (not isinstance(name, str) or name not in presets()):
            raise ConfigError(f"recipe {path}: base={name!r} must be one of {', '.join(presets())}")
        paths += [presets()[name], path] if name else [path]
    return paths


def _recipe_path(part: str, named: Mapping[str, Path]) -> Path:
    path = Path(os.path.expanduser(part))
    if part in named:
        return named[part]
    if os.path.isfile(path):
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"recipe {part} does not exist")
    raise ConfigError(f"no recipe named {part!r}: give a shipped one ({', '.join(named)}) or a .yaml file")


@functools.cache
def settings() -> list[Setting]:
    """Every setting in order of declaration, with the docstring below its field."""
    return list(_settings(Config, ""))


def _settings(section: type, prefix: str) -> Iterator[Setting]:
    from docstring_parser import parse_from_object

    docs = {param.arg_name: " ".join((param.description or "").split()) for param in parse_from_object(section).params}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Setting(prefix + field.name, hints[field.name], default, docs.get(field.name, ""))


def flat(config: Config) -> dict[str, Any]:
    """Every setting's value by its dotted key, in types that JSON has."""
    values = {setting.key: _get(config, setting.key) for setting in settings()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def to_yaml(config: Config, docs: bool = True) -> str:
    """The settings as YAML that `rethinker train` reads back to the same settings, docs as comments."""
    lines: list[str] = []
    section: list[str] = []
    for setting in settings():
        *parents, name = setting.key.split(".")
        if parents != section:
            shared = [a for a, b in zip(parents, section, strict=False) if a == b]
            lines += ["  " * depth + f"{parents[depth]}:" for depth in range(len(shared), len(parents))]
            section = parents
        indent = "  " * len(parents)
        if docs and setting.doc:
            lines.append(f"{indent}# {setting.doc}")
        lines.append(f"{indent}{name}: {_dump(_get(config, setting.key))}")
    return "\n".join(lines) + "\n"


def _dump(value: Any) -> str:
    """One value on one line of YAML."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, dict | list) and "\\n" in json.dumps(value):
        return json.dumps(value, ensure_ascii=False)  # YAML too, and keeps line breaks within the line
    quote = '"' if isinstance(value, str) and "\n" in value else None
    style = {"default_flow_style": True, "default_style": quote, "allow_unicode": True, "width": 10**6}
    text = yaml.dump(value, Dumper=_Dumper, **style)
    return text.removesuffix("...\n").strip()


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


class _Dumper(yaml.SafeDumper):
    """Writes values that occur twice twice: aliases are not read back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Plain YAML: 1e-6 is a number, as in YAML 1.2; a key given twice is a mistake; nothing refers or runs.

    Aliases are refused, since nine lines of them spell a billion values, and so is depth that no setting has.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                None, None, "aliases (*name) are not read; write the value", self.peek_event().start_mark
            )
        self.depth += 1
        if self.depth > DEEPEST_RECIPE:
            raise yaml.MarkedYAMLError(None, None, f"more than {DEEPEST_RECIPE} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, what: str) -> Any:
    """What a YAML text says; only plain values, whoever wrote it.

    Args:
        text: of a file.
        what: it is, for the message.

    Raises:
        ConfigError: in one line.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # besides its own errors, whatever Python says of `!!timestamp never` or `!!int x`
        raise ConfigError(f"{what} is not readable YAML: {' '.join(str(error).split())[:300]}") from None


def read_yaml_file(path: Path, what: str) -> Any:
    """As `read_yaml`, from a file of at most LONGEST_YAML bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_YAML + 1)
        if len(content) > LONGEST_YAML:
            raise ConfigError(f"{what} is longer than {LONGEST_YAML} bytes, so it is something else")
        return read_yaml(content.decode("utf-8"), what)
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} is not readable YAML: {' '.join(str(error).split())}") from None


def _read_recipe(path: Path) -> dict[str, Any]:
    content = read_yaml_file(path, f"recipe {path}")
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"recipe {path} must map sections to settings, not be a {type(content).__name__}")
    return {key: value for key, value in (content or {}).items() if key != "base"}


def _read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` to a mapping; values stay text until their setting's type is known."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ConfigError(f"unexpected argument {option!r}; settings are given as --section.name value")
        _find(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        values[key] = value
    return values


def _merge(values: dict[str, Any], given: Mapping[str, Any], prefix: str = "") -> None:
    """Put nested or dotted settings into `values` ({setting's key: value}); a mapping-valued setting is merged."""
    for name, value in given.items():
        key = f"{prefix}{name}"
        setting = _find(key)
        if setting is None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}={value!r} is a section; give the settings below it, as {_example(key)}")
            _merge(values, value, f"{key}.")
        elif not setting.is_mapping:
            values[key] = value
        else:
            value = read_yaml(value, f"{key}={value!r}") if isinstance(value, str) else value
            for entry in reversed(key.removeprefix(setting.key).split(".")[1:]):
                value = {entry: value}
            # A whole mapping given later replaces a recipe's, an entry joins it; both join the default.
            base = setting.default if key == setting.key else values.get(setting.key, setting.default)
            values[setting.key] = _joined(base, value) if isinstance(value, Mapping) else value


def _joined(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _joined(base[key], new[key]) for key in base.keys() & new.keys() if isinstance(new[key], Mapping)}
    return {**base, **new, **both}


def _find(key: str) -> Setting | None:
    """The setting that a key names, or whose mapping it names an entry of; None for a section."""
    known = {setting.key: setting for setting in settings()}
    if key in known:
        return known[key]
    for setting in known.values():
        if setting.is_mapping and key.startswith(f"{setting.key}."):
            return setting
    if any(name.startswith(f"{key}.") for name in known):
        return None
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, known, n=1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)
    ]
    hint = f"did you mean {close[0]!r}?" if close else "`rethinker train RECIPE --print_config` lists all settings"
    raise ConfigError(f"unknown setting {key!r}: {hint}")


def _example(section: str) -> str:
    return next(setting.key for setting in settings() if setting.key.startswith(f"{section}."))


def _convert(values: Mapping[str, Any]) -> Config:
    """Typed settings from {key: value}; a text is read as its setting's type."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = value
    parser = _parser()
    try:
        parsed = parser.instantiate(parser.parse_object(tree))
    except ArgumentError as error:
        found = re.match(r'Parser key "([^"]+)"', str(error))
        setting = found and _find(found[1])
        if not setting:
            raise ConfigError(" ".join(str(error).split())) from None
        raise ConfigError(f"{setting.key}={values[setting.key]!r} must be {in_words(setting.type)}") from None
    config = Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)})
    for setting in settings():  # the parser takes null for "not given", whatever the type
        if _get(config, setting.key) is None and type(None) not in typing.get_args(setting.type):
            raise ConfigError(f"{setting.key}={values.get(setting.key)!r} must be {in_words(setting.type)}")
    return config


@functools.cache
def _parser() -> Any:
    """The settings' types as a parser; it keeps nothing of what it has read."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def in_words(hint: Any) -> str:
    """A type as a user would say it: `int | None` is "an integer or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {in_words(arguments[0])}"
    if origin is list:
        return f"a list, each entry {in_words(arguments[0])}"
    if origin is dict:
        return f"a mapping whose values are each {in_words(arguments[1])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, "a mapping")
