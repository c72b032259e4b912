"""Imports go one way: leaves, model, hub, command line; and listing things imports no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "foundation"
# Each folder and each root module stands on a floor, and imports from its own or lower ones only.
FLOORS = {
    "": 0,  # foundation/__init__.py: only names, loaded on first use
    "errors": 0,
    **dict.fromkeys(("taxonomy", "config", "files", "hardware", "settings", "interrupt"), 1),
    **dict.fromkeys(("text", "imaging", "networks"), 2),
    **dict.fromkeys(("synthesis", "inference", "data"), 3),
    "adapting": 4,
    "model": 5,
    "hub": 6,
    **dict.fromkeys(("training", "evaluation"), 7),
    **dict.fromkeys(("pretraining", "tuning"), 8),
    "cli": 9,
    "__main__": 10,
}
STRANGERS = {("pretraining", "tuning"), ("tuning", "pretraining")}  # on one floor, yet apart
# What the move of the files left to mend: imports that go up. Nothing may be added.
UPWARD: set[str] = set()
# Methods of the model that only call the hub, which they import when they are called.
CONVENIENCE = {
    *(f"model.base hub.{name}" for name in ("load", "saved", "upload")),
    *(f"model.universal hub.{name}" for name in ("load", "upload", "adapter_files")),
}
WITHOUT_TORCH = (
    *(
        "errors",
        "taxonomy",
        "config",
        "files",
        "hub.cards",
        "hub.new_cards",
        "imaging.layout",
        "cli.main",
    ),
    *("cli.datasets", "cli.prepare", "cli.pretrain", "cli.add_class", "tuning.methods"),
)


def module_name(path: Path) -> str:
    """`foundation/pretraining/losses.py` → `pretraining.losses`; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return FLOORS[room(module)]


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
    wrong = {
        name
        for name in imports(MODULES[module])
        if (floor(name) > floor(module) or (room(module), room(name)) in STRANGERS)
        and f"{module} {name}" not in UPWARD | CONVENIENCE
    }
    assert not wrong, f"{module or 'foundation'} (floor {floor(module)}) imports {wrong}"


def test_few_modules_stand_at_the_root() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]) <= 8


def test_no_circle() -> None:
    graph = {
        module: {name for name in imports(path) - {module} if f"{module} {name}" not in CONVENIENCE}
        for module, path in MODULES.items()
    }
    assert list(TopologicalSorter(graph).static_order())


# What the scripts of the paper's tables have in common; the real ones read nothing of each other.
SHARED = {
    "costs",
    "encoders",
    "experiment_data",
    "lab",
    "plots",
    "runs",
    "sizes",
    "structures",
    "tasks",
    "verdicts",
    "world",
}


@pytest.mark.parametrize("folder", ["finetune", "benchmarks"])
def test_recipes_use_the_package_and_never_each_other(folder: str) -> None:
    for path in (REPOSITORY / folder).glob("*.py"):
        others = {other.stem for other in path.parent.glob("*.py")} | {"finetune", "benchmarks"}
        others -= SHARED
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
        "if TYPE_CHECKING:\n    from foundation.cli.main import main\n"
        "def f():\n    try:\n        from foundation import hub, __version__\n"
        "    finally:\n        from foundation.config import ModelConfig\n"
    )
    assert imports(path) == {"model", "hub", "", "config"}
    assert floor("pretraining.losses") == 8
    assert floor("networks.backbones") == 2


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
