# SPDX-License-Identifier: Apache-2.0
"""Laws of the settings loader: round trips, later sources win, and every mistake is named where it was made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from ukd_ros.config import (
    ConfigError,
    config_hash,
    from_mapping,
    leaf_keys,
    load_config,
    parse_duration,
    read_mapping,
    to_mapping,
    write_config,
)


class Colour(str, Enum):
    """A choice."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Lens:
    """A nested part with a rule of its own."""

    focal: float = 500.0
    terms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a lens without a focal length."""
        if self.focal <= 0:
            raise ValueError(f"focal: must be positive, not {self.focal}")


@dataclass(frozen=True)
class Settings:
    """Every kind of field there is."""

    name: str = "x"
    steps: int = 10
    rate: float = 1e-3
    enabled: bool = False
    colour: Colour = Colour.RED
    mode: Literal["fast", "exact"] = "fast"
    size: tuple[int, int] = (640, 480)
    folder: Path | None = None
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    lens: Lens = field(default_factory=lambda: Lens(focal=700.0))
    lenses: tuple[Lens, ...] = ()


FULL = Settings(
    name="007",
    steps=3,
    rate=0.5,
    enabled=True,
    colour=Colour.BLUE,
    mode="exact",
    size=(1, 2),
    folder=Path("a/b"),
    limit=4,
    weights={"a": 1.0},
    lens=Lens(1.0, (0.1, 0.2)),
    lenses=(Lens(2.0), Lens(3.0)),
)


def error_of(path: Path, text: str, overrides: tuple[str, ...] = ()) -> ConfigError:
    """Load `text` and return the error it must raise."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, path, overrides)
    return caught.value


@pytest.mark.parametrize("config", [Settings(), FULL])
def test_what_is_written_reads_back_equal(config: Settings, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config)
    assert load_config(Settings, tmp_path / "c.yaml") == config
    assert from_mapping(Settings, to_mapping(config), "memory") == config
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"], "nothing is left beside it"


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("steps: 20\nrate: 1e-4\nlens: {terms: [1, 2]}\n")
    config = load_config(
        Settings,
        path,
        ["steps=30", "lens.focal=9", "name=007", "size=[3, 4]", "limit=none", "colour=blue", "enabled=true"],
    )
    assert (config.steps, config.rate, config.name, config.size, config.limit) == (30, 1e-4, "007", (3, 4), None)
    assert config.lens == Lens(9.0, (1.0, 2.0)), "an override touches one nested field and keeps what the file said"
    assert config.colour is Colour.BLUE and config.enabled is True
    assert load_config(Settings, path).lens.focal == 700.0, "a partly given nested part keeps its parent's default"
    assert load_config(Settings) == Settings()


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("stps: 3", "stps", "did you mean 'steps'"),
        ("focal: 3", "focal", "did you mean 'lens.focal'"),
        ("lens: {fcal: 3}", "lens.fcal", "did you mean 'lens.focal'"),
        ("steps: 3.5", "steps", "must be an integer, not 3.5"),
        ("steps: true", "steps", "must be an integer, not true"),
        ("steps: '3'", "steps", "must be an integer, not '3'"),
        ("rate: fast", "rate", "must be a number, not 'fast'"),
        ("rate: .nan", "rate", "must be a number, not nan"),
        ("enabled: 1", "enabled", "must be true or false, not 1"),
        ("enabled: 'yes'", "enabled", "must be true or false, not 'yes'"),
        ("name: 7", "name", "must be text, not 7"),
        ("name:", "name", "must be text, not null"),
        ("mode: fats", "mode", "must be one of fast, exact, not 'fats'; did you mean 'fast'?"),
        ("colour: green", "colour", "must be one of red, blue"),
        ("size: [1, 2, 3]", "size", "must have 2 values, not 3"),
        ("size: [1, x]", "size[1]", "must be an integer, not 'x'"),
        ("lens: 3", "lens", "must be a mapping"),
        ("lens: {focal: -1}", "lens", "focal: must be positive, not -1.0"),
        ("lenses: [{focal: 1}, {focal: a}]", "lenses[1].focal", "must be a number"),
        ("weights: {a: b}", "weights.a", "must be a number"),
        ("limit: x", "limit", "must be an integer"),
        ("- 1", "", "must be a mapping"),
        ("steps: 1\nsteps: 2", "", "'steps' is written twice"),
        ("lens: {focal: 1, focal: 2}", "", "'focal' is written twice"),
        ("? [a, b]\n: 1", "", "a key must be plain text"),
        ("1: 2", "1", "is not a setting"),
        ("steps: [", "", "is not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []", "", "is not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_file_key_and_cure(text: str, key: str, words: str, tmp_path: Path) -> None:
    error = error_of(tmp_path / "c.yaml", text)
    assert error.key == key
    assert words in str(error) and str(tmp_path / "c.yaml") in str(error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "not of the form key=value"),
        ("lens.focl=1", "command line: lens.focl: is not a setting; did you mean 'lens.focal'?"),
        ("steps=many", "command line: steps: must be an integer, not 'many'"),
        ("size=[1", "is not a YAML value"),
    ],
)
def test_a_mistake_on_the_command_line_says_so(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match="command line") as caught:
        load_config(Settings, None, [override])
    assert words in str(caught.value)


def test_overrides_do_not_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        load_config(Settings, None, ["steps=1", "steps=2"])
    with pytest.raises(ConfigError, match="as a whole and in part"):
        load_config(Settings, None, ["lens={}", "lens.focal=2"])


def test_a_required_field_is_asked_for() -> None:
    @dataclass(frozen=True)
    class Needs:
        count: int

    with pytest.raises(ConfigError, match="count: is missing"):
        from_mapping(Needs, {}, "file")


def test_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError, match="cannot be read|UTF-8"):
            read_mapping(tmp_path / name)


def test_the_hash_sees_every_setting_and_is_the_same_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    changed = [
        "name=y",
        "steps=11",
        "rate=1",
        "enabled=true",
        "colour=blue",
        "mode=exact",
        "size=[1,1]",
        "folder=f",
        "limit=1",
    ]
    changed += ["weights={a: 1}", "lens.focal=1", "lens.terms=[1]", "lenses=[{focal: 2}]"]
    assert {text.partition("=")[0] for text in changed} == set(leaf_keys(Settings))
    hashes = [config_hash(load_config(Settings, None, [text])) for text in changed] + [config_hash(Settings())]
    assert len(set(hashes)) == len(hashes)
    write_config(path, Lens(2.0))
    code = "from test_config import Lens; from ukd_ros.config import *; "
    code += f"print(config_hash(load_config(Lens, {str(path)!r})))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == config_hash(Lens(2.0))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("9m", 540), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("9min", 540), ("1m 5s", 65)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "-9m", "9d", "9m2h", "0s", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)
