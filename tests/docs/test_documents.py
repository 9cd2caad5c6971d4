"""Documents that run: every Python block, in order, in one namespace per document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNNABLE = [path for path in DOCUMENTS if BLOCK.search(path.read_text()) and path.name != "architecture.md"]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_blocks_run(path: Path) -> None:
    """What a document shows works as shown."""
    namespace: dict[str, object] = {"__name__": "document"}
    text = path.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """A relative link or a named source file exists."""
    text = path.read_text()
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in links if not (path.parent / target).exists()]
    files = re.findall(r"`((?:swsnp|src|docs|tests|tools|examples|bench)/[\w./-]+)`", text)
    missing += [name for name in files if not ((ROOT / name).exists() or (ROOT / "src" / name).exists())]
    assert missing == []
