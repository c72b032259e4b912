"""Strict reading of settings: what is right becomes a dataclass, what is wrong is explained."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from foundation.errors import UsageError, WeightsError
from foundation.settings import ByKind, Cube, did_you_mean, read, read_file, read_yaml


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius_mm: float = 1.0

    def __post_init__(self) -> None:
        if self.radius_mm <= 0:
            raise UsageError(f"radius_mm is {self.radius_mm}; it must be above 0.")


@dataclass(frozen=True)
class Square:
    kind: Literal["square"] = "square"
    side: int = 1


@dataclass(frozen=True)
class Drawing:
    name: str
    shapes: tuple[Annotated[Circle | Square, ByKind()], ...] = ()
    size: Annotated[tuple[int, int, int], Cube()] = (1, 1, 1)
    window: tuple[float, float] = (0.0, 1.0)
    frame: Square = field(default_factory=Square)
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    colour: Literal["red", "blue"] = "red"
    limit: float | None = None
    visible: bool = True
    text: str | int = ""
    border: Circle | Square | None = None


def drawing(**values: object) -> Drawing:
    return read(Drawing, {"name": "n", **values}, "here")


def test_values_become_a_dataclass_of_the_fields_types() -> None:
    shapes = [{"kind": "square", "side": 2}, {"kind": "circle", "radius_mm": 3}]
    made = drawing(shapes=shapes, size=[1, 2, 3], options={"a": [1, {"b": None}]}, limit=None)
    assert made.shapes == (Square(side=2), Circle(radius_mm=3.0))
    assert isinstance(made.shapes[1], Circle) and isinstance(made.shapes[1].radius_mm, float)
    assert made.size == (1, 2, 3) and made.options == {"a": [1, {"b": None}]}
    assert drawing() == Drawing("n")
    assert drawing(size=4).size == (4, 4, 4)
    assert drawing(labels={1: "a"}).labels == {1: "a"}
    assert drawing(window=(-1, 2)).window == (-1.0, 2.0)
    assert (drawing(text=3).text, drawing(text="3").text) == (3, "3")


def test_paths_and_dates_are_text() -> None:
    assert drawing(text=Path("a") / "b").text == str(Path("a") / "b")
    assert drawing(text=datetime.date(2026, 1, 2)).text == "2026-01-02"
    assert drawing(text=read_yaml("2026-01-02")).text == "2026-01-02"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": []}, "here: unknown key 'shape'. Did you mean 'shapes'? Allowed: name, shapes"),
        ({"frame": {"sid": 1}}, "here: frame: unknown key 'sid'. Did you mean 'side'?"),
        ({"shapes": [{"kind": "circle", "side": 1}]}, "here: shapes[0]: unknown key 'side'."),
        ({"shapes": [{"kind": "circel"}]}, "shapes[0]: kind is 'circel'. Did you mean 'circle'?"),
        ({"shapes": [{}]}, "here: shapes[0]: kind is None. Choose from circle, square."),
        ({"shapes": [3]}, "here: shapes[0] is 3; expected keys and values."),
        ({"shapes": {"kind": "circle"}}, "shapes is {'kind': 'circle'}; expected a list."),
        ({"shapes": None}, "here: shapes is None; expected a list."),
        ({"shapes": [{"kind": "circle", "radius_mm": 0}]}, "here: shapes[0]: radius_mm is 0.0; it"),
        ({"shapes": [{"kind": "circle", "radius_mm": "1"}]}, "[0].radius_mm is '1'; expected flo"),
        ({"size": [1, 2]}, "here: size is [1, 2]; expected 3 values."),
        ({"size": [1, 2, 3, 4]}, "here: size is [1, 2, 3, 4]; expected 3 values."),
        ({"size": [1, 2, "3"]}, "here: size[2] is '3'; expected int."),
        ({"size": True}, "here: size is True; expected 3 values."),
        ({"window": 3}, "here: window is 3; expected 2 values."),
        ({"frame": 3}, "here: frame is 3; expected keys and values."),
        ({"frame": {"side": True}}, "here: frame.side is True; expected int."),
        ({"frame": {"side": 1.0}}, "here: frame.side is 1.0; expected int."),
        ({"frame": {"side": "1"}}, "here: frame.side is '1'; expected int."),
        ({"options": [1]}, "here: options is [1]; expected keys and values."),
        ({"labels": {"a": "b"}}, "here: labels.a is 'a'; expected int."),
        ({"labels": {"1": 2}}, "here: labels.1 is 2; expected str. Put it in quotes."),
        ({"colour": "green"}, "here: colour is 'green'; choose from red, blue."),
        ({"limit": float("nan")}, "here: limit is nan; expected a finite float or null."),
        ({"limit": True}, "here: limit is True; expected float or null."),
        ({"limit": "much"}, "here: limit is 'much'; expected float or null."),
        ({"visible": "yes"}, "here: visible is 'yes'; expected bool."),
        ({"visible": 1}, "here: visible is 1; expected bool."),
        ({"name": 7}, "here: name is 7; expected str. Put it in quotes."),
        ({"name": None}, "here: name is None; expected str."),
        ({"border": {"kind": "square", "sides": 1}}, "here: border: unknown key 'sides'."),
        ({"text": [1]}, "here: text is [1]; expected str or int."),
        ({"text": object}, "here: holds something that is no plain value: <class 'object'>."),
        ({"options": {(1, 2): 3}}, "here: holds something that is no plain value: keys must be"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        drawing(**values)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (3, "here: expected keys and values, not 3."),
        ([], "here: expected keys and values, not []."),
        ({}, "here: the key 'name' is missing."),
        ({"nam": "n"}, "here: unknown key 'nam'. Did you mean 'name'?"),
    ],
)
def test_what_is_missing_is_named(values: object, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(Drawing, values, "here")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("given", [True, 1.0, "1", 2, None])
def test_another_format_version_is_refused(given: object) -> None:
    assert read(Square, {"format_version": 1, "side": 2}, "f", version=1) == Square(side=2)
    with pytest.raises(WeightsError, match=r"f: format_version is .* reads format version 1\."):
        read(Square, {"format_version": given}, "f", version=1, error=WeightsError)
    with pytest.raises(UsageError, match="expected keys and values"):
        read(Square, [given], "f", version=1)


def test_the_callers_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="expected int"):
        read(Square, {"side": "a"}, "f", error=WeightsError)
    with pytest.raises(WeightsError, match="nowhere"):
        read_file(tmp_path / "nowhere.json", error=WeightsError)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5e-3, null]}')
    (tmp_path / "a.yaml").write_text("a: [1, 25e-4, null]")
    assert read_file(tmp_path / "a.json") == read_file(tmp_path / "a.yaml")
    (tmp_path / "b.json").write_text("[" * 100_000)
    (tmp_path / "c.json").write_bytes(b"\xff{}")
    (tmp_path / "d.json").write_text("1" * 5000)
    (tmp_path / "b.yaml").write_text("a: [")
    for name in ("b.json", "c.json", "d.json"):
        with pytest.raises(UsageError, match="cannot be read as JSON"):
            read_file(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        read_file(tmp_path / "b.yaml")


def test_numbers_of_yaml() -> None:
    for text in ("4e-4", "4E-4", "4.0e-4", "+4e-4", ".4e-3"):
        assert read_yaml(text) == 4e-4
    assert read_yaml("1e3") == 1000.0 and read_yaml("04") == 4 and read_yaml("'4e-4'") == "4e-4"
    assert read_yaml("e4") == "e4" and read_yaml("4e") == "4e" and read_yaml("1.5") == 1.5


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: 1, c: 2, b: 3}")
    with pytest.raises(UsageError, match="'b' stands twice"):
        read_file(path)
    assert read_yaml("x: &x {a: 1}\ny: {<<: *x, a: 2}")["y"] == {"a": 2}
    assert read_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


def test_suggestions() -> None:
    names = ["liver", "kidney_left", "kidney_right"]
    assert did_you_mean("livr", names) == " Did you mean 'liver'?"
    assert did_you_mean("xyz", names) == ""
    both = did_you_mean("kidney", names, most=2, cutoff=0.5)
    assert both == " Did you mean 'kidney_left' or 'kidney_right'?"


def test_importing_it_is_light() -> None:
    script = (
        "import sys, foundation.settings; print({'pydantic', 'yaml', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
