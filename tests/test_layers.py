"""Imports go one way: leaves, model, hub, command line; and listing things imports no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

import foundation

PACKAGE = REPOSITORY / "foundation"
LEAF = 1  # the layer of every module that is not named here; leaves know no higher layer
LAYERS = {
    "": 0,  # foundation/__init__.py: only names, loaded on first use
    "errors": 0,
    "taxonomy": 0,
    "config": 0,
    "inference": 2,  # works on any network with the model's attributes
    "prompts": 2,  # so does this
    "model": 3,
    "saved": 4,
    "attachment": 5,
    "hub": 5,
    "adapters": 6,
    "pretraining": 6,
    "tuning": 6,
    "arguments": 6,
    "batch": 6,
    "demo": 6,
    "cli": 6,
    "__main__": 7,
}
WITHOUT_TORCH = (
    *("errors", "taxonomy", "config", "cards", "files", "layout", "arguments"),
    *("datasets.command", "preparation.command", "pretraining.command", "tuning.command"),
)


def module_name(path: Path) -> str:
    """`foundation/pretraining/losses.py` → `pretraining.losses`; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    return LAYERS.get(module, LAYERS.get(module.split(".")[0], LEAF))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Everything that runs, functions included; what only type checkers see left out."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(statement, name, []))


def imports(path: Path) -> set[str]:
    """Names of the modules of the package that the file imports, at its top or in functions."""
    found = set()
    for statement in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{path.name}: relative imports hide the direction"
            base = str(statement.module)
            names = {f"{base}.{alias.name}" for alias in statement.names}
            modules = {name for name in names if name.removeprefix("foundation.") in MODULES}
            # `from package import module` imports the module; any other name, the package.
            found |= modules | ({base} if modules != names else set())
    inside = {name for name in found if name == "foundation" or name.startswith("foundation.")}
    return {name.removeprefix("foundation").removeprefix(".") for name in inside}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    wrong = {name for name in imports(MODULES[module]) if layer(name) > layer(module)}
    assert not wrong, f"{module or 'foundation'} (layer {layer(module)}) imports {wrong}"


def test_no_circle() -> None:
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", ["finetune", "benchmarks"])
def test_recipes_use_the_package_and_never_each_other(folder: str) -> None:
    for path in (REPOSITORY / folder).glob("*.py"):
        others = {other.stem for other in path.parent.glob("*.py")} | {"finetune", "benchmarks"}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not roots & others, f"{path.name} imports {roots & others}"


def test_the_rules_see_what_they_must(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import foundation.model\n"
        "if TYPE_CHECKING:\n    from foundation.cli import main\n"
        "def f():\n    try:\n        from foundation import hub, __version__\n"
        "    finally:\n        from foundation.config import ModelConfig\n"
    )
    assert imports(path) == {"model", "hub", "", "config"}
    assert layer("pretraining.losses") == 6
    assert layer("backbones") == LEAF


def test_listing_imports_no_torch() -> None:
    modules = [f"foundation.{name}" for name in WITHOUT_TORCH]
    script = (
        f"import sys, importlib, foundation\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "foundation.list_models(); foundation.CLASSES; foundation.WeightsError\n"
        "print(sorted({'torch', 'monai', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_there() -> None:
    assert set(foundation.__all__) == set(foundation._HOME_OF)
    assert set(foundation.__all__) <= set(dir(foundation))
    for name in foundation.__all__:
        assert getattr(foundation, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        foundation.nothing  # noqa: B018
