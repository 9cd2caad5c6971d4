"""Run the harnesses: `python -m fuzz [NAME...]`.

Inputs that break an invariant go to build/fuzz/NAME/; give such a file to `--replay` to see it again.
Exit status: 0 nothing found, 1 something found.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fuzz.engine import harnesses, run

if TYPE_CHECKING:
    from fuzz.engine import Harness, Run

OUT = Path("build/fuzz")


def _options() -> argparse.Namespace:
    command = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    command.add_argument("names", nargs="*", metavar="NAME", help="harnesses; all by default")
    command.add_argument(
        "--seconds",
        type=float,
        default=float(os.environ.get("FUZZ_SECONDS", "60")),
        help="for each harness (default: FUZZ_SECONDS, or 60)",
    )
    command.add_argument("--seed", type=int, default=None, help="repeat a run (default: another each time)")
    command.add_argument(
        "--engine",
        choices=("auto", "python", "atheris"),
        default=os.environ.get("FUZZ_ENGINE", "auto"),
        help="atheris follows the code that inputs reach; auto uses it when it is installed",
    )
    command.add_argument("--replay", type=Path, help="run one input through one harness")
    return command.parse_args()


def _tell(done: Run) -> None:
    rate = done.executions / max(done.seconds, 1e-9)
    found = f"{len(done.findings)} findings" if done.findings else "nothing found"
    print(
        f"{done.harness.name:<12} {done.executions:>9,} executions {rate:>9,.0f}/s  "
        f"{done.corpus:>3} inputs kept  {found}",
        flush=True,
    )
    for finding in done.findings.values():
        folder = OUT / done.harness.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / finding.name).write_bytes(finding.data)
        print(f"  {finding.error}\n  input: {folder / finding.name}\n{finding.trace}", flush=True)


def _with_atheris(harness: Harness, seconds: float) -> bool:
    """Run a harness in a process of its own, since atheris never returns; whether it found something."""
    folder = OUT / harness.name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(harness.seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    arguments = [f"-max_total_time={max(1, round(seconds))}", f"-artifact_prefix={folder}/", str(corpus)]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.coverage_guided", harness.name, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    lines = (done.stdout + done.stderr).splitlines()
    last = next((line for line in reversed(lines) if line.startswith("Done ")), "")
    print(f"{harness.name:<12} {last or 'ended early'}  {'FOUND' if done.returncode else 'nothing found'}")
    if done.returncode:
        print("\n".join(f"  {line}" for line in lines[-40:]), flush=True)
    return done.returncode != 0


def main() -> int:
    """Run what was asked for."""
    options = _options()
    logging.disable(logging.CRITICAL)  # refusals that are provoked are no news
    known = {harness.name: harness for harness in harnesses()}
    if unknown := [name for name in options.names if name not in known]:
        print(f"no harness {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.names or known]
    if options.replay is not None:
        for harness in chosen:
            print(harness.name, harness.one(options.replay.read_bytes()))
        return 0
    atheris = importlib.util.find_spec("atheris") is not None
    if options.engine == "atheris" and not atheris:
        print("atheris is not installed; remedy: pip install -e '.[fuzz]'", file=sys.stderr)
        return 2
    found = False
    for harness in chosen:
        if atheris and options.engine != "python":
            found |= _with_atheris(harness, options.seconds)
            continue
        seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
        done = run(harness, seconds=options.seconds, seed=seed)
        _tell(done)
        found |= bool(done.findings)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
