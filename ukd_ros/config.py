# SPDX-License-Identifier: Apache-2.0
"""The one strict loader of settings: a YAML file, `key=value` texts or a mapping become a frozen dataclass.

Nothing is guessed and nothing is ignored: an unknown key, a key written twice, a value of another type or a value that
the dataclass itself refuses raises `ConfigError`, which names the file (or "command line"), the dotted key, what was
expected and, for a misspelt key, the nearest one that exists. YAML is read with the safe loader only.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import tempfile
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")

COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A setting that cannot be used: `source` (file or "command line"), dotted `key` ("" for the whole), `problem`."""

    def __init__(self, source: str, key: str, problem: str) -> None:
        """Word the sentence `source: key: problem`."""
        self.source, self.key, self.problem = source, key, problem
        super().__init__(": ".join(part for part in (source, key, problem) if part))


class _Text(str):
    """A value typed on the command line: not YAML yet, so that `name=007` stays text where text is expected."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing a key written twice (PyYAML would silently take the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping; a repeated key is an error with its line."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _yaml_error("a key must be plain text", key_node)
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise _yaml_error(f"the key {key_node.value!r} is written twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _yaml_error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping (an empty file is an empty mapping); ConfigError otherwise."""
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(source, "", f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(source, "", f"is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(source, "", f"is not valid YAML: {_one_line(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(source, "", f"must be a mapping of keys to values, not {_kind_of(value)}")
    return value


def load_config(
    kind: type[Config], path: str | Path | None = None, overrides: Sequence[str] = (), base: Config | None = None
) -> Config:
    """Build `kind` from `base` (or its defaults), the YAML file `path` and `key=value` texts, each over the last.

    Dots stand between nested keys. ConfigError as the module describes.
    """
    config = from_mapping(kind, read_mapping(path), str(path), base=base) if path is not None else base
    if config is None or overrides:
        config = from_mapping(kind, parse_overrides(overrides), COMMAND_LINE, base=config)
    return config


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Turn `["window.size=128", "seed=3"]` into the nested mapping of `from_mapping`; ConfigError if malformed."""
    tree: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(COMMAND_LINE, text, "is not of the form key=value (dots between nested keys)")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(COMMAND_LINE, key, "is set as a whole and in part; choose one")
        if parts[-1] in node:
            raise ConfigError(COMMAND_LINE, key, "is given twice")
        node[parts[-1]] = _Text(value.strip())
    return tree


def from_mapping(
    kind: type[Config], values: Mapping[str, Any], source: str, key: str = "", base: Config | None = None
) -> Config:
    """Build the dataclass `kind` from `values`; fields not named keep the value of `base`, or else their default.

    `source` and the dotted prefix `key` are for messages. ConfigError as the module describes, also around a ValueError
    of the dataclass' own `__post_init__`.
    """
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
        raise TypeError(f"{kind!r} is not a dataclass")
    if not isinstance(values, Mapping):
        raise ConfigError(source, key, f"must be a mapping of keys to values, not {_kind_of(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in values.items():
        here = _join(key, str(name))
        if name not in fields:
            raise ConfigError(source, here, f"is not a setting{_suggestion(kind, str(name), key)}")
        arguments[name] = _convert(hints[name], value, source, here, arguments.get(name, _default(fields[name])))
    for name, field in fields.items():
        if name not in arguments and _default(field) is dataclasses.MISSING:
            raise ConfigError(source, _join(key, name), f"is missing ({_name_of(hints[name])} expected)")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(source, key, str(error)) from error


def to_mapping(config: Any) -> Any:
    """Return a dataclass as plain YAML-able values: the inverse of `from_mapping`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        names = [field.name for field in dataclasses.fields(config) if field.init]
        return {name: to_mapping(getattr(config, name)) for name in names}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Mapping):
        return {str(name): to_mapping(value) for name, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_mapping(value) for value in config]
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"{type(config).__name__} is no setting: it has no plain YAML form")


def config_hash(config: Any) -> str:
    """Return 16 hexadecimal digits that change when any setting does (equal in every process and on every machine)."""
    plain = json.dumps(to_mapping(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def write_config(path: str | Path, config: Any) -> None:
    """Write a dataclass as YAML; the file appears whole, by rename."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump(to_mapping(config), file, sort_keys=False, allow_unicode=True)
        os.chmod(name, 0o644)  # mkstemp makes it private; a settings file is not
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?")


def parse_duration(text: str) -> float:
    """Return seconds from "9m", "90s", "1.5h" or "1h30m"; ValueError for anything else, also a bare number."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{text!r} is not a duration; write 90s, 9m, 2h or 1h30m")
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration: it must be longer than nothing")
    return seconds


def leaf_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting of a dataclass type, nested ones included."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        nested = _dataclass_in(hints[field.name])
        if nested is None:
            yield _join(prefix, field.name)
        else:
            yield from leaf_keys(nested, _join(prefix, field.name))


# ---- one value -------------------------------------------------------------------------------------------------


def _convert(kind: Any, value: Any, source: str, key: str, base: Any = dataclasses.MISSING) -> Any:
    """Return `value` as the annotated type `kind`; ConfigError naming `key` and what was expected."""
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return _convert_union(kind, value, source, key, base)
    if origin is Literal:
        return _convert_choice(value, {_spelling(choice): choice for choice in get_args(kind)}, source, key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        if isinstance(value, kind):
            return value
        return _convert_choice(value, {_spelling(member.value): member for member in kind}, source, key)
    if isinstance(value, _Text) and kind is not str and not _is_path(kind):
        value = _read_text(value, source, key)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        return from_mapping(kind, value, source, key, base if isinstance(base, kind) else None)
    if origin in (tuple, list, Sequence):
        return _convert_sequence(kind, value, source, key)
    if origin in (dict, Mapping):
        return _convert_mapping(kind, value, source, key)
    return _convert_scalar(kind, value, source, key)


def _convert_scalar(kind: Any, value: Any, source: str, key: str) -> Any:
    """Convert to bool, int, float, str, Path or Any."""
    if kind is Any:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        number = _number(value)
        if number is not None and not math.isnan(number):
            return number
    if kind is str and isinstance(value, str):
        return str(value)
    if _is_path(kind) and isinstance(value, (str, os.PathLike)) and str(value):
        return Path(value)
    if kind not in (bool, int, float, str) and not _is_path(kind):
        raise TypeError(f"{key}: settings of type {_name_of(kind)} cannot be loaded")
    raise ConfigError(source, key, f"must be {_name_of(kind)}, not {_shown(value)}")


def _number(value: Any) -> float | None:
    """Read a real number; also `1e-3`, which YAML 1.1 takes for text because it has no dot."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return None


def _convert_union(kind: Any, value: Any, source: str, key: str, base: Any) -> Any:
    """Take the first member that accepts the value; None (`null`, `none`) only where the union has it."""
    members = [member for member in get_args(kind) if member is not type(None)]
    optional = len(members) < len(get_args(kind))
    if optional and (value is None or (isinstance(value, _Text) and value.lower() in ("null", "none", "~", ""))):
        return None
    problem: ConfigError | None = None
    for member in members:
        try:
            return _convert(member, value, source, key, base)
        except ConfigError as error:
            problem = error
    if len(members) == 1 and problem is not None:
        raise problem
    raise ConfigError(source, key, f"must be {_name_of(kind)}, not {_shown(value)}")


def _convert_choice(value: Any, choices: dict[str, Any], source: str, key: str) -> Any:
    """Pick a member of a Literal or Enum by its spelling."""
    spelling = value if isinstance(value, str) else _spelling(value)
    if spelling in choices:
        return choices[spelling]
    close = difflib.get_close_matches(str(spelling), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(source, key, f"must be one of {', '.join(choices)}, not {_shown(value)}{hint}")


def _convert_sequence(kind: Any, value: Any, source: str, key: str) -> Any:
    """Convert to `tuple[X, ...]`, `tuple[X, Y]`, `list[X]` or `Sequence[X]` (a tuple)."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(source, key, f"must be {_name_of(kind)}, not {_shown(value)}")
    members = get_args(kind)
    if get_origin(kind) is tuple and not (len(members) == 2 and members[1] is Ellipsis):
        if len(value) != len(members):
            raise ConfigError(source, key, f"must have {len(members)} values, not {len(value)}")
    else:
        members = (members[0],) * len(value)
    pairs = enumerate(zip(members, value, strict=True))
    items = [_convert(member, item, source, f"{key}[{i}]") for i, (member, item) in pairs]
    return items if get_origin(kind) is list else tuple(items)


def _convert_mapping(kind: Any, value: Any, source: str, key: str) -> dict[str, Any]:
    """Convert to `dict[str, X]`."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(source, key, f"must be {_name_of(kind)}, not {_shown(value)}")
    return {str(name): _convert(get_args(kind)[1], item, source, _join(key, str(name))) for name, item in value.items()}


def _read_text(text: _Text, source: str, key: str) -> Any:
    """Read a command-line value as YAML: `3`, `true`, `[1, 2]`, `{a: 1}`."""
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(source, key, f"is not a YAML value: {_one_line(error)}") from error


# ---- words for messages ----------------------------------------------------------------------------------------


def _suggestion(kind: Any, name: str, prefix: str) -> str:
    """Word the nearest valid key: a sibling first, else the same name elsewhere, else the list of siblings."""
    siblings = [field.name for field in dataclasses.fields(kind) if field.init]
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"; did you mean {_join(prefix, close[0])!r}?"
    deeper = [leaf for leaf in leaf_keys(kind, prefix) if leaf.rpartition(".")[2] == name]
    if deeper:
        return f"; did you mean {deeper[0]!r}?"
    return f"; there are {', '.join(siblings)}" if siblings else "; there are none here"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _dataclass_in(kind: Any) -> Any:
    """Return the dataclass of `X` or `X | None`, or None."""
    members = [kind, *get_args(kind)] if get_origin(kind) in (Union, types.UnionType) else [kind]
    return next((member for member in members if dataclasses.is_dataclass(member) and isinstance(member, type)), None)


def _is_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, os.PathLike)


def _spelling(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_NAMES: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


def _name_of(kind: Any) -> str:
    """Name a type as a user says it."""
    origin, members = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if _is_path(kind):
        return "a path"
    if origin is Union or origin is types.UnionType:
        return " or ".join(_name_of(member) for member in members)
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return "one of " + ", ".join(_spelling(c) for c in (members if origin is Literal else [m.value for m in kind]))
    if origin in (tuple, list, Sequence):
        if origin is tuple and not (len(members) == 2 and members[1] is Ellipsis):
            return f"a list of {len(members)} values"
        return f"a list ({_name_of(members[0])} each)"
    if origin in (dict, Mapping):
        return f"a mapping of names to values ({_name_of(members[1])} each)"
    return str(getattr(kind, "__name__", kind))


def _kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else _shown(value)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return _spelling(value).replace("none", "null")
    text = repr(str(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
