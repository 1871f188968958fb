# SPDX-License-Identifier: Apache-2.0
"""ROS parameters from frozen dataclasses: the dataclass beside the code that uses it says everything once.

A field becomes the parameter ``prefix.field``; nested dataclasses nest. The field's metadata gives ``help``, ``unit``,
``min``, ``max``, ``choices`` and ``live`` (False: only read at configure). What ``__post_init__`` refuses with a
ValueError is refused as a parameter with the same sentence.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult

Options = TypeVar("Options")

INTEGER_LIMIT = 2**31 - 1
FLOAT_LIMIT = 1.7976931348623157e308


@dataclasses.dataclass(frozen=True)
class ParameterField:
    """One leaf of an options dataclass: its parameter name, the path of field names to it, its field and its type."""

    name: str
    path: tuple[str, ...]
    field: dataclasses.Field[Any]
    kind: Any

    @property
    def live(self) -> bool:
        """Return whether the parameter may change while the node is configured."""
        return bool(self.field.metadata.get("live", True))


def parameter_fields(options: Any, prefix: str = "") -> Iterator[ParameterField]:
    """Yield every leaf of the dataclass instance ``options``, names starting with ``prefix``."""
    kinds = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            for leaf in parameter_fields(value, name):
                yield dataclasses.replace(leaf, path=(field.name, *leaf.path))
        else:
            yield ParameterField(name, (field.name,), field, kinds[field.name])


def value_at(options: Any, path: Sequence[str]) -> Any:
    """Return the field at ``path``."""
    for name in path:
        options = getattr(options, name)
    return options


def replaced(options: Options, path: Sequence[str], value: Any) -> Options:
    """Return ``options`` with the field at ``path`` set; every dataclass on the way is validated anew."""
    if len(path) > 1:
        value = replaced(getattr(options, path[0]), path[1:], value)
    return dataclasses.replace(options, **{path[0]: value})  # type: ignore[type-var]


def to_parameter(value: Any) -> Any:
    """Return ``value`` as a parameter holds it: enumerations by value, tuples as lists, None as an empty string."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_parameter(item) for item in value]
    return "" if value is None else value


def from_parameter(kind: Any, value: Any) -> Any:
    """Return a parameter's ``value`` as the field of type ``kind`` holds it; ValueError for an unknown enumerator."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    if type(None) in typing.get_args(kind) and value == "":
        return None
    return float(value) if kind is float else value


def descriptor(leaf: ParameterField) -> ParameterDescriptor:
    """Return the parameter's description, unit, range and constraints."""
    metadata = leaf.field.metadata
    unit = f" [{metadata['unit']}]" if metadata.get("unit") else ""
    constraints = []
    if metadata.get("choices"):
        constraints.append("one of " + ", ".join(repr(choice) for choice in metadata["choices"]))
    if not leaf.live:
        constraints.append("read at configure: change it while the node is unconfigured")
    out = ParameterDescriptor(
        name=leaf.name,
        description=f"{metadata.get('help', leaf.name)}{unit}",
        additional_constraints="; ".join(constraints),
    )
    low, high = metadata.get("min"), metadata.get("max")
    if (low, high) != (None, None) and leaf.kind is float:
        out.floating_point_range = [
            FloatingPointRange(
                from_value=-FLOAT_LIMIT if low is None else float(low),
                to_value=FLOAT_LIMIT if high is None else float(high),
                step=0.0,
            )
        ]
    if (low, high) != (None, None) and leaf.kind is int:
        out.integer_range = [
            IntegerRange(
                from_value=-INTEGER_LIMIT if low is None else int(low),
                to_value=INTEGER_LIMIT if high is None else int(high),
                step=1,
            )
        ]
    return out


def check_choice(leaf: ParameterField, value: Any) -> None:
    """Raise ValueError when the field lists its choices and ``value`` is none of them."""
    choices = leaf.field.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"is '{value}', but one of {', '.join(map(str, choices))} is needed.")


class OptionParameters:
    """The node's parameters as groups of frozen dataclasses, always valid, replaced as a whole when one changes."""

    def __init__(
        self,
        node: Any,
        groups: dict[str, Any],
        configured: Callable[[], bool],
        check: Callable[[dict[str, Any]], None],
    ) -> None:
        """Declare every field of ``groups`` (prefix -> defaults) on ``node``; ``configured`` locks what is not live.

        ``check`` sees all groups before a change is taken and may refuse it with a ValueError.

        rclpy's ParameterException subclasses come from here when a launch file or YAML gives a wrong type or range;
        ValueError when the options refuse it.
        """
        self._groups = dict(groups)
        self._configured = configured
        self._check = check
        self._leaves: dict[str, tuple[str, ParameterField]] = {}
        self.version = 0
        for prefix, defaults in groups.items():
            for leaf in parameter_fields(defaults, prefix):
                self._leaves[leaf.name] = (prefix, leaf)
                default = to_parameter(value_at(defaults, leaf.path))
                given = node.declare_parameter(leaf.name, default, descriptor(leaf)).value
                if given != default:
                    self._groups[prefix] = self._changed(self._groups, prefix, leaf, given)
        node.add_on_set_parameters_callback(self._on_set)

    def group(self, prefix: str) -> Any:
        """Return the present options under ``prefix``."""
        return self._groups[prefix]

    def _changed(self, groups: dict[str, Any], prefix: str, leaf: ParameterField, value: Any) -> Any:
        try:
            converted = from_parameter(leaf.kind, value)
            check_choice(leaf, converted)
            return replaced(groups[prefix], leaf.path, converted)
        except ValueError as error:
            raise ValueError(f"parameter {leaf.name}: {error}") from error

    def _on_set(self, parameters: Sequence[Any]) -> SetParametersResult:
        """Accept all of ``parameters`` or none, with the reason."""
        groups = dict(self._groups)
        for parameter in parameters:
            if parameter.name not in self._leaves:
                continue
            prefix, leaf = self._leaves[parameter.name]
            unchanged = to_parameter(value_at(groups[prefix], leaf.path)) == parameter.value
            if not leaf.live and self._configured() and not unchanged:
                reason = (
                    f"parameter {leaf.name} is read when the node is configured and cannot change now: run "
                    "'ros2 lifecycle set' with deactivate and cleanup first, or restart the node."
                )
                return SetParametersResult(successful=False, reason=reason)
            try:
                groups[prefix] = self._changed(groups, prefix, leaf, parameter.value)
            except ValueError as error:
                return SetParametersResult(successful=False, reason=str(error))
        try:
            self._check(groups)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._groups = groups
        self.version += 1
        return SetParametersResult(successful=True)
