"""One harness under atheris: `python -m fuzz.coverage_guided NAME [libFuzzer's options]`."""

from __future__ import annotations

import logging
import sys

import atheris

__all__ = ["main"]


def main() -> None:
    """Instrument the project while it is imported, then hand over to libFuzzer, which does not return."""
    name = sys.argv.pop(1)
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["swsnp", "fuzz"]):
        from fuzz.engine import harnesses
    one = {harness.name: harness.one for harness in harnesses()}[name]

    def execute(data: bytes) -> None:
        one(data)

    atheris.Setup(sys.argv, execute)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
