"""Structure: imports point down, parties do not know each other, clock and chance come in as arguments."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "swsnp"
PARTIES = ("firmware", "hypervisor", "cpu", "vmm", "guest")
BELOW: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "trace": set(),
    "abi": {"errors"},
    "crypto": {"errors", "abi"},
    "hardware": {"errors", "abi"},
    "measure": {"errors", "abi", "crypto"},
    "certs": {"errors", "abi", "crypto"},
    "verify": {"errors", "abi", "crypto", "certs"},
    "amd_ca": {"errors", "abi", "crypto", "certs"},
    **{party: {"errors", "trace", "abi", "crypto", "hardware", "measure"} for party in PARTIES},
}
BELOW["vmm"].add("certs")  # the lock on the certificate file, which operators' tools hold too
BELOW["machine"] = set(BELOW) - {"verify"}
BELOW["state"] = BELOW["machine"] | {"machine"}
BELOW["testing"] = BELOW["state"] | {"state", "verify"}
BELOW["front"] = BELOW["testing"] - {"testing"}
BELOW["cli"] = BELOW["front"] | {"front", "testing"}
BELOW["__main__"] = {"cli"}


def _package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("swsnp"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("swsnp.")]
    return found


MODULES = [
    path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or path.name != "__init__.py"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """docs/architecture.md: a package imports only what lies below it; a party never imports another."""
    package = _package(path)
    allowed = BELOW[package] | {package, "_version"}
    wrong = [f"line {line}: swsnp.{name}" for line, name in _imports(path) if name not in allowed]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_clock_and_chance_come_in_as_arguments(path: Path) -> None:
    """No function body calls the clock or the system's entropy: both enter through constructors."""
    forbidden = {
        "os.urandom",
        "time.time",
        "time.monotonic",
        "time.sleep",
        "datetime.now",
        "random.random",
        "secrets.token_bytes",
    }
    tree = ast.parse(path.read_text())
    # the functions whose only work is to be such a default
    defaults = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and f.name == "utc_now"
        for n in ast.walk(f)
    }
    wrong = [
        f"line {node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and id(node) not in defaults and ast.unparse(node.func) in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_promises(path: Path) -> None:
    """Every module has a docstring and, unless it is an empty package, `__all__`."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    defines = any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body)
    names = {
        t.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name)
    }
    assert not defines or "__all__" in names


@pytest.mark.parametrize("module", ["swsnp", "swsnp.abi"])
def test_core_import_is_light(module: str) -> None:
    """Importing the core loads neither command line, HTTP nor cryptography."""
    code = (
        f"import {module}, sys; "
        "heavy = {'argparse', 'http', 'cryptography', 'Crypto', 'asn1crypto', 'awscrt', 'ssl', 'socket'}; "
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_abi_uses_the_standard_library_only() -> None:
    """Layouts are usable anywhere: no third-party import below `abi`."""
    for path in sorted((SOURCE / "abi").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            outside = [
                n for n in names if n.split(".")[0] not in {*sys.stdlib_module_names, "swsnp", "__future__"}
            ]
            assert outside == [], path.name


def test_promised_names_exist() -> None:
    """Every name that the package promises can be fetched."""
    import swsnp

    for name in swsnp.__all__:
        assert getattr(swsnp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = swsnp.nothing


def test_names_of_the_layouts_exist() -> None:
    """`swsnp.abi` promises three names, which it fetches when they are used."""
    import swsnp.abi

    for name in swsnp.abi.__all__:
        assert getattr(swsnp.abi, name) is not None
    with pytest.raises(AttributeError, match="module 'swsnp.abi' has no attribute 'nothing'"):
        _ = swsnp.abi.nothing
