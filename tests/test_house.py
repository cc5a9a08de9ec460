"""The arrows of the house: what each wing may import, read off the sources."""

import ast
from functools import cache
from pathlib import Path

import pytest

import mea_compress

ROOT = Path(mea_compress.__file__).parent
MODULES = {
    ".".join(("mea_compress", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}


@cache
def imports(module):
    """Modules of the package that a module imports anywhere, functions and type hints included."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} - {""}
    return found


@cache
def reached(start):
    """Everything that a module imports, directly or not."""
    seen, queue = set(), [start]
    while queue:
        for name in imports(queue.pop()) - seen - {"mea_compress"}:
            seen.add(name)
            queue.append(name)
    return seen


def in_wings(name, *wings):
    return any(name == f"mea_compress.{wing}" or name.startswith(f"mea_compress.{wing}.") for wing in wings)


def wing(*names):
    return [module for module in MODULES if in_wings(module, *names)]


def test_the_sources_are_read():
    assert "mea_compress.checkpoint.reader" in imports("mea_compress.emit.directory") | reached(
        "mea_compress.compression"
    )
    assert in_wings("mea_compress.modeling.section_mea", "modeling")


@pytest.mark.parametrize("module", wing("measure"))
def test_measuring_imports_no_training(module):
    assert not [
        name
        for name in reached(module)
        if in_wings(name, "healing", "training", "fit", "demo", "pipeline", "compression")
    ]


@pytest.mark.parametrize("module", wing("checkpoint"))
def test_files_import_no_presentation_and_nothing_above_them(module):
    allowed = ("checkpoint", "errors")
    assert not [name for name in reached(module) if not in_wings(name, *allowed)]


@pytest.mark.parametrize("module", wing("heads", "compositions"))
def test_heads_and_compositions_import_no_file(module):
    reads = ("checkpoint", "architectures", "layers", "planning", "fit", "emit", "recipe", "report")
    assert not [name for name in reached(module) if in_wings(name, *reads)]


@pytest.mark.parametrize("module", wing("modeling"))
def test_modeling_imports_nothing_of_the_rest(module):
    assert not [name for name in reached(module) if not in_wings(name, "modeling")]


@pytest.mark.parametrize("module", wing("report"))
def test_reports_take_plain_data(module):
    assert not [name for name in reached(module) if not in_wings(name, "report", "errors")]


@pytest.mark.parametrize("module", wing("recipe", "planning", "layers", "training", "fit", "emit", "measure"))
def test_data_goes_down_the_house_once(module):
    """recipe → plan → layers → fit → emit → measure: nothing above the verbs is imported below them."""
    above = ("cli", "pipeline", "compression", "healing", "demo", "sweeping")
    assert not [name for name in reached(module) if in_wings(name, *above)]


def test_nothing_goes_round_in_circles():
    circles = {module for module in MODULES if module in reached(module)}
    assert not circles
