"""From a recipe and overrides to checked settings: reading, merging, and errors that name the key."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import strftime
from typing import Any

import yaml

from rethinker.checks import check_geometry, check_resources
from rethinker.config import Config, ConfigError, nearest
from rethinker.ranges import Range, in_words, range_of

# Far beyond any recipe.
LONGEST_YAML = 2**20
DEEPEST_RECIPE = 32

RENAMED: dict[str, str] = {
    "data.shuffle_buffer": "data.streaming shuffles all rows, whose places alone are held; leave it out"
}
"""Of a setting that was renamed or removed: what to write instead."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the settings: its dotted key, type, range, default and documentation."""

    key: str
    type: Any
    range: Range | None
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
            dotted or nested: `{"train.max_steps": 20}`. It is not changed, nor is it part of the result.

    Raises:
        ConfigError: naming the setting, its value, and what would work. Nothing has been written or loaded then.
    """
    config = resolve_config(recipe, overrides)
    check_resources(config)
    return config


def resolve_config(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Config:
    """As `load_config`, without looking at this machine's disk, models and packages."""
    values: dict[str, Any] = {}
    given = overrides or {}
    for mapping in (*_recipes(recipe), given if isinstance(given, Mapping) else _read_arguments(given)):
        _merge(values, mapping)
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
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def presets() -> dict[str, Path]:
    """What can be added to a recipe as RECIPE+PRESET, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes" / "presets").glob("*.yaml"))}


def _recipes(recipe: str | Path) -> Iterator[dict[str, Any]]:
    """What the parts of `NAME+PRESET+...` say, each a shipped recipe or preset or a YAML file: later ones win."""
    is_file = os.path.isfile(os.path.expanduser(recipe))  # unlike Path.is_file no error on a name no file can have
    for number, part in enumerate([str(recipe)] if is_file else str(recipe).split("+")):
        named = {**presets(), **shipped_recipes()} if number else shipped_recipes()
        path = Path(os.path.expanduser(part))
        if part not in named and not os.path.isfile(path):
            if path.suffix in (".yaml", ".yml"):
                raise ConfigError(f"recipe {part} does not exist")
            raise ConfigError(f"no recipe named {part!r}: give a shipped one ({', '.join(named)}) or a .yaml file")
        yield from _with_base(named.get(part, path))


def _with_base(path: Path) -> Iterator[dict[str, Any]]:
    """What a recipe's `base` says, a shipped recipe or preset, and then what the recipe itself says."""
    content = read_yaml_file(path, f"recipe {path}") or {}
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} must map sections to settings, not be a {type(content).__name__}")
    base, shipped = content.pop("base", None), {**presets(), **shipped_recipes()}
    if base is not None:
        if not isinstance(base, str) or base not in shipped:
            raise ConfigError(f"recipe {path}: base={base!r} must be one of {', '.join(shipped)}")
        yield from _with_base(shipped[base])
    yield content


@functools.cache
def settings() -> list[Setting]:
    """Every setting in order of declaration, with the docstring below its field."""
    return list(_settings(Config, ""))


def _settings(section: type, prefix: str) -> Iterator[Setting]:
    from docstring_parser import parse_from_object

    docs = {param.arg_name: " ".join((param.description or "").split()) for param in parse_from_object(section).params}
    plain, ranged = typing.get_type_hints(section), typing.get_type_hints(section, include_extras=True)
    for name, default in vars(section()).items():
        if dataclasses.is_dataclass(default):
            yield from _settings(plain[name], f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, plain[name], range_of(ranged[name]), default, docs.get(name, ""))


def flat(config: Config) -> dict[str, Any]:
    """Every setting's value by its dotted key, in types that JSON has."""
    values = {setting.key: _get(config, setting.key) for setting in settings()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def to_yaml(config: Config, docs: bool = True) -> str:
    """The settings as YAML that `rethinker train` reads back to the same settings, docs as comments."""
    texts = {setting.key: setting.doc for setting in settings()} if docs else {}

    def lines(section: Any, prefix: str, indent: str) -> Iterator[str]:
        for name, value in vars(section).items():
            if dataclasses.is_dataclass(value):
                yield f"{indent}{name}:"
                yield from lines(value, f"{prefix}{name}.", indent + "  ")
            else:
                if text := texts.get(prefix + name):
                    yield f"{indent}# {text}"
                yield f"{indent}{name}: {_dump(value)}"

    return "\n".join(lines(config, "", "")) + "\n"


def _dump(value: Any) -> str:
    """One value on one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Writes values that occur twice twice, since aliases are not read, and texts with line breaks on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """Plain YAML: 1e-6 is a number, as in YAML 1.2; a key given twice is a mistake; nothing refers or runs.

    Aliases are not read, since nine lines of them spell a billion values, and neither is depth that no setting has.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value", problem_mark=mark)
        self.depth += 1
        if self.depth > DEEPEST_RECIPE:
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST_RECIPE} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, what: str) -> Any:
    """What a YAML text says: plain values, whoever wrote it. A ConfigError names `what` in one line."""
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
        raise ConfigError(f"{what} is not readable YAML: {' '.join(str(error).split())[:300]}") from None


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
                example = next(setting.key for setting in settings() if setting.key.startswith(f"{key}."))
                raise ConfigError(f"{key}={value!r} is a section; give the settings below it, as {example}")
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
    for setting in known.values():
        if key == setting.key or (setting.is_mapping and key.startswith(f"{setting.key}.")):
            return setting
    if any(name.startswith(f"{key}.") for name in known):
        return None
    if key in RENAMED:
        raise ConfigError(f"the setting {key!r} is gone: {RENAMED[key]}")
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = nearest(key, known) or leaves.get(nearest(key.rpartition(".")[2], leaves))
    hint = f"did you mean {close!r}?" if close else "`rethinker train RECIPE --print_config` lists all settings"
    raise ConfigError(f"unknown setting {key!r}: {hint}")


def _convert(values: Mapping[str, Any]) -> Config:
    """Settings of their types and in their ranges, from {key: value}; a text is read as its setting's type."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = value
    parser = _parser()
    try:
        config = Config(**vars(parser.instantiate(parser.parse_object(tree))))
    except ArgumentError as error:
        found = re.match(r'Parser key "([^"]+)"', str(error))
        setting = found and _find(found[1])
        if not setting:
            raise ConfigError(" ".join(str(error).split())) from None
        raise ConfigError(f"{setting.key}={values[setting.key]!r} must be {in_words(setting.type)}") from None
    for setting in settings():
        value = _get(config, setting.key)
        if value is None and type(None) not in typing.get_args(setting.type):  # to the parser null is "not given"
            raise ConfigError(f"{setting.key}={values.get(setting.key)!r} must be {in_words(setting.type)}")
        if value is not None and setting.range and not setting.range.holds(value):
            raise ConfigError(f"{setting.key}={value} must be {setting.range.words}")
    return config


@functools.cache
def _parser() -> Any:
    """The settings' types as a parser; it keeps nothing of what it has read."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser
