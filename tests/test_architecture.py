"""Who may import whom, no cycles, no work at import: elegance decays through imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("ingestion", "tuning", "training", "compression", "serving", "monitoring", "autopilot")
MAY_IMPORT = {("tuning", "training"), ("compression", "training")} | {("autopilot", stage) for stage in STAGES}
SOURCES = sorted(file for folder in ("app", "jobs", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
# Parsed while tests are collected: before 3.11.8 Python's parser fails where another thread parses as well
# (python/cpython#106905), and a cluster's threads live from the first test that needs one.
TREES = {file: ast.parse(file.read_text()) for file in SOURCES}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owner(module: str) -> str | None:
    """The stage package a module belongs to, or none for shared modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "app" and len(parts) > 1 and parts[1] in STAGES else None


MODULES = {module_of(file): file for file in SOURCES}


def project_imports(module: str) -> set[str]:
    found = set()
    for name in imports_of(MODULES[module]):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if (candidate := ".".join(parts[:length])) in MODULES:
                found.add(candidate)
                break
    return found - {module}


def test_there_is_something_to_check() -> None:
    assert {"app.config", "app.job", "jobs.lifecycle"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_the_right_way(module: str) -> None:
    package = module.split(".")[0]
    for imported in project_imports(module):
        top = imported.split(".")[0]
        if package == "app":
            assert top == "app", f"{module} imports {imported}: app imports neither jobs nor benchmarks"
            ours, theirs = owner(module), owner(imported)
            if theirs is not None and theirs != ours:
                assert ours is not None, f"{module} is shared and imports the stage {theirs}"
                assert (ours, theirs) in MAY_IMPORT, f"{module}: a stage never imports another ({imported})"
        if package == "jobs":
            assert top != "benchmarks", f"{module} imports {imported}"


def test_there_are_no_import_cycles() -> None:
    graph = {module: project_imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_keep_the_house_rules(file: Path) -> None:
    tree = TREES[file]
    assert ast.get_docstring(tree), f"{file} has no docstring"
    if file.name == "__init__.py":
        assert len(tree.body) == 1, f"{file} holds more than a docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__", f"{file}: typed Serve builders stop working with future annotations"
            assert node.level == 0, f"{file}: imports are absolute"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_happens_at_import(file: Path) -> None:
    """Top-level statements define; a bare call, loop or block other than the main guard would work."""
    for node in TREES[file].body:
        if isinstance(node, ast.Expr):
            text = isinstance(node.value, ast.Constant)
            registers = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
            assert text or (registers and node.value.func.attr == "add_implicit_resolver"), ast.unparse(node)
        if isinstance(node, ast.If):
            assert "__main__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test)
        assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try), f"{file}:{node.lineno}"


@pytest.mark.parametrize("module", ["app.config", "app.errors", "app.versions"])
def test_checking_a_configuration_needs_neither_ray_nor_torch(module: str) -> None:
    heavy = "{'ray', 'torch', 'transformers', 'mlflow', 'pyiceberg', 'pyarrow', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
