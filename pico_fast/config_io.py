"""Reading, overriding and writing the configuration; all mistakes are reported at once, with key and near miss."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pico_fast.config import Config, problems


class ConfigError(Exception):
    """The configuration is wrong; the message lists every problem found."""

    def __init__(self, found: Sequence[str], source: str = "configuration"):
        self.problems = list(found)
        count = f"{len(found)} problem{'s' if len(found) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in found)]))


class _Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that reads ``3e-4`` as a number, as YAML 1.2 does, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"repeated or unusable key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A YAML scalar that reads as a boolean, number or date, and its text: ``off`` may be meant as a word."""

    value: Any
    text: str

    def __repr__(self) -> str:
        return self.text


def _keeping_text(read: Callable[[Any, yaml.ScalarNode], Any]) -> Callable[[Any, yaml.ScalarNode], _Scalar]:
    return lambda loader, node: _Scalar(read(loader, node), node.value)


for _kind in ("bool", "int", "float", "timestamp"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", _keeping_text(getattr(yaml.SafeLoader, f"construct_yaml_{_kind}"))
    )
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _described(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_described(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_described(typing.get_args(hint)[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]


def _coerced(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; TypeError where it cannot be had without guessing."""
    origin = typing.get_origin(hint)
    if isinstance(value, _Scalar) and origin is None:
        value = value.text if hint is str else value.value
    if origin in (typing.Union, types.UnionType):
        return _coerced_to_one_of(value, typing.get_args(hint))
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise TypeError
        return value
    if origin is list:
        if not isinstance(value, list):
            raise TypeError
        return [_coerced(item, typing.get_args(hint)[0]) for item in value]
    if hint is float and isinstance(value, str):
        try:  # a quoted "3e-4" is what pico-train's users write to get around YAML 1.1
            value = float(value)
        except ValueError:
            raise TypeError from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _coerced_to_one_of(value: Any, hints: Sequence[Any]) -> Any:
    """``value`` as the first of ``hints`` that takes it; TypeError if none does."""
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        if hint is not type(None):
            with contextlib.suppress(TypeError):
                return _coerced(value, hint)
    raise TypeError


def _near_miss(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def _apply(section: Any, values: Mapping[str, Any], prefix: str, found: list[str]) -> None:
    hints = typing.get_type_hints(type(section))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            found.append(f"{key}: unknown key{_near_miss(str(name), list(hints))}")
        elif dataclasses.is_dataclass(hints[name]):
            if value is None:
                found.append(f"{key}: empty section; give it keys or remove the line")
            elif not isinstance(value, Mapping):
                found.append(f"{key}: a section with keys expected, {value!r} given")
            else:
                _apply(getattr(section, name), value, f"{key}.", found)
        else:
            try:
                setattr(section, name, _coerced(value, hints[name]))
            except TypeError:
                found.append(f"{key}: {_described(hints[name])} expected, {value!r} given")


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], source) from None


def _override(text: str, tree: dict[str, Any], found: list[str]) -> None:
    """Write ``section.key=value`` into ``tree``; the value is YAML."""
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        found.append(f"{text!r}: an override is section.key=value")
        return
    node: dict[str, Any] = tree
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            found.append(f"{key}: {part!r} is not a section")
            return
        node = child
    try:
        node[path[-1]] = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        found.append(f"{key}: {value!r} is not valid YAML")


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """The configuration from a YAML file (None: the defaults) and ``section.key=value`` overrides.

    Raises ConfigError that names every problem: unknown keys with the near miss, wrong types, values out of bounds,
    shapes that do not divide for ``world_size`` processes (None: nobody is to train, any number will do).
    """
    source, tree = "configuration", {}
    found: list[str] = []
    if path is not None:
        source = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"cannot be read: {error}"], source) from None
        tree = _parse_yaml(text, source)
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            raise ConfigError([f"sections with keys expected, {type(tree).__name__} given"], source)
    for override in overrides:
        _override(override, tree, found)
    config = Config()
    _apply(config, tree, "", found)
    found += problems(config, world_size)
    if found:
        raise ConfigError(found, source)
    return config


def to_yaml(config: Config) -> str:
    """``config`` as YAML: plain dictionaries, keys in alphabetical order, as pico-train's training_config.yaml."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=True, allow_unicode=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys that both have with different values, and the two values."""
    for name in sorted(set(before) & set(now)):
        if isinstance(before[name], Mapping) and isinstance(now[name], Mapping):
            yield from changes(before[name], now[name], f"{prefix}{name}.")
        elif before[name] != now[name]:
            yield f"{prefix}{name}", before[name], now[name]
