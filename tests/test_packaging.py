"""The package is what it says: one top-level name, typed, layered, with an entry point, cheap to import."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hisa_compile"
# Imports go from a higher layer to a lower or equal one.
LAYERS = {"ops": 0, "passes": 1}
FACE = 2


def layer_of(path: Path) -> int:
    parts = path.relative_to(PACKAGE).parts
    return LAYERS.get(parts[0], FACE) if len(parts) > 1 else FACE


def imported_layers(path: Path):
    """(line, layer) of every import of this package in a file, absolute or relative, at any depth."""
    package = ("hisa_compile", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "hisa_compile":
                yield node.lineno, LAYERS.get(parts[1], FACE) if len(parts) > 1 else FACE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, without a download."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("hisa_compile", "tests", "benchmarks", "examples", "docs"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LAYERS:
        (source / name).symlink_to(Path("hisa_compile") / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_alone(wheel):
    """Tests, benchmarks and the top-level links stay out; types, licence and every module are in."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert sorted(top.split("-")[0] for top in tops) == ["hisa_compile", "hisa_compile"]
    assert any(top.endswith(".dist-info") for top in tops)
    assert "hisa_compile/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_wheel_registers_the_backend(wheel):
    """The entry point names the backend, and nothing else is registered."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(path).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "torch_dynamo_backends": {"hisa": "hisa_compile.backend:hisa_backend"}
    }


@pytest.mark.parametrize("logs", ["", "hisa_compile"])
def test_the_installed_backend_works_by_name(wheel, tmp_path, logs):
    """backend="hisa" with nothing of ours imported; TORCH_LOGS="hisa_compile" shows the line of the compile."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys, torch\n"
        "imported = 'hisa_compile' in sys.modules\n"
        "f = torch.compile(lambda x: x.topk(2), backend='hisa', options={'hisa.base': 'aot_eager'})\n"
        "f(torch.randn(3, 5))\n"
        "print(imported, sys.modules['hisa_compile'].__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **({"TORCH_LOGS": logs} if logs else {})}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported, file = done.stdout.split()
    assert file.startswith(str(tmp_path))
    # torch imports a module whose logs are asked for.
    assert (imported == "True") == bool(logs)
    assert ("0 of 1 selections" in done.stderr) == bool(logs)


def test_importing_the_package_does_not_import_the_compiler():
    """A program that only calls the operator does not pay for Inductor, Dynamo or Triton."""
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import hisa_compile\n"
        "new = {name for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name.startswith(('torch._inductor', 'torch._dynamo', 'triton'))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_flow_from_face_to_passes_to_operators():
    """The operators know nothing of graphs, the passes nothing of backends."""
    upward = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, layer in imported_layers(path)
        if layer > layer_of(path)
    ]
    assert upward == []


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_top_level_links_are_relative(name):
    """They work in any checkout, and point into the package."""
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"hisa_compile/{name}"
