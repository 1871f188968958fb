# SPDX-License-Identifier: Apache-2.0
"""Options as parameters: every leaf is declared, checked and written down."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ukd_ros.ros.parameter_file import parameter_file, pose_node_groups, yaml_scalar
from ukd_ros.ros.parameters import OptionParameters, parameter_fields, replaced, to_parameter, value_at

CONFIG = Path(__file__).resolve().parents[2] / "config" / "pose.yaml"


class Color(str, Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    level: float = field(default=0.5, metadata={"help": "A level.", "unit": "0..1", "min": 0.0, "max": 1.0})
    color: Color = field(default=Color.RED, metadata={"help": "A colour."})

    def __post_init__(self) -> None:
        if self.level == 0.25:
            raise ValueError("level: 0.25 is bad luck.")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    count: int = field(default=3, metadata={"help": "A count.", "min": 1, "live": False})
    sizes: tuple[float, ...] = field(default=(1.0, 2.0), metadata={"help": "Sizes."})
    name: str = field(default="a", metadata={"choices": ("a", "b")})


class FakeNode:
    """Declares what it is told, with ``given`` values over the defaults, and keeps the callback."""

    def __init__(self, **given: Any) -> None:
        self.given = {name.replace("__", "."): value for name, value in given.items()}
        self.descriptors: dict[str, Any] = {}
        self.callback: Any = None

    def declare_parameter(self, name: str, default: Any, descriptor: Any) -> Any:
        self.descriptors[name] = descriptor
        return SimpleNamespace(value=self.given.get(name, default))

    def add_on_set_parameters_callback(self, callback: Any) -> None:
        self.callback = callback

    def set(self, **values: Any) -> Any:
        return self.callback([SimpleNamespace(name=n.replace("__", "."), value=v) for n, v in values.items()])


def parameters(node: FakeNode, configured: bool = False) -> OptionParameters:
    return OptionParameters(node, {"x": Outer()}, lambda: configured, lambda groups: None)


def test_leaves_nest_by_name_and_are_replaced_at_their_place() -> None:
    leaves = {leaf.name: leaf for leaf in parameter_fields(Outer(), "x")}
    assert list(leaves) == ["x.inner.level", "x.inner.color", "x.count", "x.sizes", "x.name"]
    changed = replaced(Outer(), leaves["x.inner.level"].path, 0.75)
    assert changed.inner.level == 0.75 and changed.count == 3
    assert value_at(changed, leaves["x.inner.level"].path) == 0.75


def test_descriptors_tell_unit_range_and_when_it_is_read() -> None:
    node = FakeNode()
    parameters(node)
    level, count = node.descriptors["x.inner.level"], node.descriptors["x.count"]
    assert level.description == "A level. [0..1]"
    assert (level.floating_point_range[0].from_value, level.floating_point_range[0].to_value) == (0.0, 1.0)
    assert (count.integer_range[0].from_value, count.integer_range[0].to_value) == (1, 2**31 - 1)
    assert "configure" in count.additional_constraints and not level.additional_constraints


def test_given_values_reach_the_options_in_their_own_types() -> None:
    options = parameters(FakeNode(x__inner__color="blue", x__sizes=[4.0], x__inner__level=1.0))
    assert options.group("x").inner == Inner(1.0, Color.BLUE)
    assert options.group("x").sizes == (4.0,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x__inner__level": 0.25}, "bad luck"),
        ({"x__inner__color": "green"}, "x.inner.color"),
        ({"x__name": "c"}, "one of a, b"),
        ({"x__count": 5}, "x.count is read when the node is configured"),
    ],
)
def test_a_refused_change_changes_nothing_and_says_why(change: dict[str, Any], reason: str) -> None:
    node = FakeNode()
    options = parameters(node, configured=True)
    result = node.set(x__sizes=[9.0], **change)
    assert not result.successful and reason in result.reason
    assert options.group("x") == Outer() and options.version == 0
    assert node.set(x__sizes=[9.0], x__count=3).successful
    assert options.group("x").sizes == (9.0,) and options.version == 1


def test_a_wrong_start_value_names_its_parameter() -> None:
    with pytest.raises(ValueError, match=r"x\.inner\.level.*bad luck"):
        parameters(FakeNode(x__inner__level=0.25))


@pytest.mark.parametrize("value", [True, 3, 0.1, 1e-6, 1e20, 1.5e-7, "", 'a "quoted" \\ word', "true", "12"])
def test_scalars_come_back_from_yaml_with_their_type(value: Any) -> None:
    read = yaml.safe_load(yaml_scalar(value))
    assert read == value and type(read) is type(value)


def test_the_shipped_file_has_every_parameter_at_its_default() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    remedy = "write it again: python -m ukd_ros.ros.parameter_file > config/pose.yaml"
    assert text == parameter_file(pose_node_groups()), remedy
    flat: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(yaml.safe_load(text)["/**"]["ros__parameters"], "")
    for prefix, options in pose_node_groups().items():
        for leaf in parameter_fields(options, prefix):
            default = to_parameter(value_at(options, leaf.path))
            read = flat.pop(leaf.name)
            assert read == default or math.isclose(read, default), leaf.name
            assert type(read) is type(default), leaf.name
            assert leaf.field.metadata.get("help"), f"{leaf.name} has no help"
    assert not flat
