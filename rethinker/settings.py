"""From a recipe and overrides to checked settings: reading, merging, and errors that name the key."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import strftime
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rethinker import ranges
from rethinker.checks import check_geometry, check_resources
from rethinker.config import Config, ConfigError, nearest, one_line

GONE: dict[str, tuple[Any, str]] = {
    "data.shuffle_buffer": (10_000, "data.streaming shuffles all rows, whose places alone are held; remove it"),
    "policy.fused_layers": (False, "policy.compile=true fuses the same operations; remove it"),
}
"""Of a setting that was renamed or removed: its default, which older runs' config.yaml says and is read over, and
what to write instead."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the settings: its dotted key, type, default, documentation, and JSON schema, with its range."""

    key: str
    type: Any
    default: Any
    doc: str
    schema: dict[str, Any]

    @property
    def is_mapping(self) -> bool:
        return self.type is dict or typing.get_origin(self.type) is dict

    @property
    def is_text(self) -> bool:
        """Whether a text is its value as it stands, and not YAML to be read."""
        return self.type in (str, str | None) or typing.get_origin(self.type) is typing.Literal

    @property
    def type_in_words(self) -> str:
        """The type as config.py has it, and its bounds: `int | None, at least 1`."""
        words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        schema = self.schema.get("anyOf", [self.schema])[0]
        name = inspect.formatannotation(self.type).replace("typing.", "")
        bounds = [f"{word} {schema[bound]}" for bound, word in words.items() if bound in schema]
        return ", ".join([re.sub(r"Optional.(.*).$", r"\1 | None", name), *bounds])


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
    schema = _settings_type().json_schema()
    return list(_settings(Config, schema["$defs"] | {"Config": schema}, ""))


def _settings(section: type, schemas: dict[str, Any], prefix: str) -> Iterator[Setting]:
    properties, hints = schemas[section.__name__]["properties"], typing.get_type_hints(section)
    for name, default in vars(section()).items():
        if dataclasses.is_dataclass(default):
            yield from _settings(hints[name], schemas, f"{prefix}{name}.")
        else:
            doc = " ".join(properties[name].get("description", "").split())
            yield Setting(prefix + name, hints[name], default, doc, properties[name])


@functools.cache
def _settings_type() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def flat(config: Config) -> dict[str, Any]:
    """Every setting's value by its dotted key, in types that JSON has."""
    values = {setting.key: _get(config, setting.key) for setting in settings()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def to_yaml(config: Config) -> str:
    """The settings as YAML that `rethinker train` reads back to the same settings; comments say meaning and type."""
    lines, above = [], []
    for setting in settings():
        *sections, name = setting.key.split(".")
        indent = "  " * len(sections)
        if sections != above:
            above, outer = sections, indent[2:]
            lines += ["", *_comment(inspect.getdoc(_get(config, ".".join(sections))), outer), f"{outer}{sections[-1]}:"]
        lines += _comment(f"{setting.doc} ({setting.type_in_words})", indent)
        lines.append(f"{indent}{name}: {_dump(_get(config, setting.key))}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    marks = {"initial_indent": f"{indent}# ", "subsequent_indent": f"{indent}# "}
    return textwrap.wrap(" ".join(text.split()), 110, **marks, break_long_words=False, break_on_hyphens=False)


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
    """Plain YAML: as in YAML 1.2 1e-6 is a number, and 3:5 and 2026-01-31 are texts; a key given twice is a mistake;
    nothing refers or runs."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # nine lines of them spell a billion values
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


for _kind in (_Loader, _Dumper):  # the one reads what the other writes
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
for _known in map(_Loader.yaml_implicit_resolvers.get, "-+0123456789"):
    _known.insert(0, ("tag:yaml.org,2002:str", re.compile(r"\S*\d[:-]\d")))


def read_yaml(text: str, what: str) -> Any:
    """What a YAML text says: plain values, whoever wrote it. A ConfigError names `what` in one line."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # besides its own errors, whatever Python says of `!!timestamp never` or `!!int x`
        raise ConfigError(f"{what} is not readable YAML: {one_line(error)}") from None


def read_yaml_file(path: Path, what: str) -> Any:
    """As `read_yaml`, from a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} is not readable YAML: {one_line(error)}") from None
    return read_yaml(text, what)


def _read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` to a mapping; values stay text until their setting's type is known."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ConfigError(f"unexpected argument {option!r}; settings are given as --section.name value")
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
        if key in GONE and value == GONE[key][0]:
            continue
        setting = _find(key)
        if setting is None:
            if not isinstance(value, Mapping):
                example = next(setting.key for setting in settings() if setting.key.startswith(f"{key}."))
                raise ConfigError(f"{key}={value!r} is a section; give the settings below it, as {example}")
            _merge(values, value, f"{key}.")
            continue
        if isinstance(value, str) and not setting.is_text:
            value = read_yaml(value, f"{key}={value!r}")
        elif value == "null" and type(None) in typing.get_args(setting.type):
            value = None
        for entry in reversed(key.removeprefix(setting.key).split(".")[1:]):
            value = {entry: value}
        if setting.is_mapping and isinstance(value, Mapping):
            # A whole mapping given later replaces a recipe's, an entry joins it; both join the default.
            base = setting.default if key == setting.key else values.get(setting.key, setting.default)
            value = joined(base, value)
        values[setting.key] = value


def joined(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of both, those of mappings too; where both have one that is no mapping, the new one."""
    pairs = {key: (base[key], new[key]) for key in base.keys() & new.keys()}
    both = {key: joined(*pair) for key, pair in pairs.items() if all(isinstance(value, Mapping) for value in pair)}
    return {**base, **new, **both}


def _find(key: str) -> Setting | None:
    """The setting that a key names, or whose mapping it names an entry of; None for a section."""
    known = {setting.key: setting for setting in settings()}
    for setting in known.values():
        if key == setting.key or (setting.is_mapping and key.startswith(f"{setting.key}.")):
            return setting
    if any(name.startswith(f"{key}.") for name in known):
        return None
    if key in GONE:
        raise ConfigError(f"the setting {key!r} is gone: {GONE[key][1]}")
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = nearest(key, known) or leaves.get(nearest(key.rpartition(".")[2], leaves))
    hint = f"did you mean {close!r}?" if close else "`rethinker train RECIPE --print_config` lists all settings"
    raise ConfigError(f"unknown setting {key!r}: {hint}")


def _convert(values: Mapping[str, Any]) -> Config:
    """Settings of their types and in their ranges, from {key: value}."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = value
    try:
        return _settings_type().validate_python(copy.deepcopy(tree))
    except ValidationError as error:
        first = error.errors()[0]
        problem = ranges.problem_of(first)
        problem += " (in quotes)" * (first["type"] == "string_type" and first["input"] is not None)
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}={first['input']!r} {problem}") from None
