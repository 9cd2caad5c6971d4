"""An import hook: modules of the chosen packages are loaded with the switches of `finder.instrument`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import TYPE_CHECKING

from tests.mutation.finder import SWITCH_NAME, Mutant, instrument
from tests.mutation.switch import SWITCH

if TYPE_CHECKING:
    import ast
    from collections.abc import Sequence
    from pathlib import Path
    from types import CodeType, ModuleType

__all__ = ["Instrumented", "install", "read_sources"]


class Instrumented:
    """The chosen modules: their mutants, and the syntax trees that contain them."""

    def __init__(self) -> None:
        self.mutants: list[Mutant] = []
        self.trees: dict[str, ast.Module] = {}

    def add(self, path: Path, root: Path) -> None:
        """Read one module; its mutants get the next numbers."""
        file = str(path.relative_to(root))
        tree, mutants = instrument(path.read_text(), file, len(self.mutants))
        self.trees[str(path)] = tree
        self.mutants += mutants


def read_sources(root: Path, folders: Sequence[str]) -> Instrumented:
    """Find all checks below `folders` (from `root`, files too), in the order of the file names."""
    found = Instrumented()
    for folder in folders:
        top = root / folder
        for path in [top] if top.is_file() else sorted(top.rglob("*.py")):
            if str(path) not in found.trees:
                found.add(path, root)
    return found


def install(found: Instrumented) -> None:
    """Load these modules with their mutants from now on; call it before anything imports them."""
    sys.meta_path.insert(0, _Finder(found))


class _Finder:
    def __init__(self, found: Instrumented) -> None:
        self._found = found

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("swsnp."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or spec.origin not in self._found.trees:
            return None
        spec.loader = _Loader(name, spec.origin, self._found.trees[spec.origin])
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:
        """Compiled here and not cached: a stored module must never contain mutants."""
        del fullname
        return compile(self._tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[SWITCH_NAME] = SWITCH
        super().exec_module(module)
