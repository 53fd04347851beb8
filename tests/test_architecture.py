"""Who may import whom: the rules that keep each third-party API in one place and the core pure."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "alice_jax").rglob("*.py")) + sorted((ROOT / "configs").glob("*.py"))

# Third-party package -> the files that may import it.
ONLY_IN = {
    "grain": {"alice_jax/data/pipeline.py"},
    "nibabel": {"alice_jax/data/nifti.py"},
    "SimpleITK": {"alice_jax/data/dicom.py"},
    "tensorstore": {"alice_jax/data/files.py", "alice_jax/data/store.py"},
    "orbax": {"alice_jax/checkpoint.py"},
    "surface_distance": {"alice_jax/evaluation/surfaces.py"},
    "sklearn": {"alice_jax/evaluation/class_scores.py"},
    "tensorboardX": {"alice_jax/metrics.py"},
}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level_imports(path: Path) -> set[str]:
    """Only what importing the file itself imports."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def packages(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports(path):
    name, modules = path.relative_to(ROOT).as_posix(), imports(path)
    for package, allowed in ONLY_IN.items():
        assert name in allowed or package not in packages(modules), f"{name} imports {package}"
    if name.startswith("configs/"):
        assert packages(modules) == {"ml_collections"}
    if name.startswith("alice_jax/data/"):
        assert not packages(modules) & {"jax", "flax", "optax"}, f"{name}: data is numpy on the host"
    pure = name.startswith("alice_jax/models/") or name in ("alice_jax/losses.py", "alice_jax/schedules.py")
    if pure:
        assert not packages(modules) & {"ml_collections", "os", "pathlib", "grain"}
        assert not {m for m in modules if m.startswith("alice_jax.") and m.split(".")[1] not in PURE_MAY_IMPORT}
    assert "torch" not in packages(top_level_imports(path)), f"{name}: torch is optional, import it inside a function"


PURE_MAY_IMPORT = ("models", "errors", "losses", "schedules")


def test_no_file_is_too_long_and_none_is_a_drawer():
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, f"{path.name}: split it, one job per file"
        assert path.name != "utils.py"
