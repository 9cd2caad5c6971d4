"""What a run came to: a table, survivors last, `build/mutation.json`, and the exit status."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tests.mutation.judge import Result, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mutation.judge import Judge

__all__ = ["conclude", "read_equivalent"]

_ALIVE: Final = (Verdict.SURVIVED, Verdict.UNREACHED)
_GRACE: Final = "listed as equivalent, but"


def read_equivalent(path: Path) -> dict[str, str]:
    """Keys of mutants that cannot be killed, with the reason of each."""
    entries = tomllib.loads(path.read_text()).get("equivalent", [])
    for each in entries:
        if set(each) != {"mutant", "reason"} or not each["reason"].strip():
            raise ValueError(f"{path.name}: got {sorted(each)}, wanted mutant and reason: {each}")
    return {each["mutant"]: each["reason"] for each in entries}


def conclude(
    judge: Judge, equivalent: dict[str, str], json_path: Path, *, table: bool = False, whole: bool = True
) -> int:
    """Print and store the results.

    Args:
        judge: after its session.
        equivalent: as `read_equivalent` gives them.
        json_path: where the results go.
        table: print all mutants, not only survivors.
        whole: every mutant was judged, by all tests: entries of `equivalent` must be right.

    Returns:
        The exit status: 1 for a survivor that is not listed, a wrong entry, or a test that fails by itself.
    """
    results = [_known(each, equivalent) for each in judge.results]
    if table:
        for each in results:
            print(_line(each))
    print(_summary(results))
    json_path.parent.mkdir(exist_ok=True)
    json_path.write_text(json.dumps(_stored(judge, results), indent=1) + "\n")
    wrong = [f"a test fails without any mutant: {each}" for each in judge.failed]
    wrong += _wrong_entries(results, equivalent) if whole else []
    wrong += [_line(each) for each in results if each.verdict in _ALIVE]
    if wrong:
        print("\nto be looked at:", *wrong, sep="\n")
    return 1 if wrong else 0


def _known(result: Result, equivalent: dict[str, str]) -> Result:
    if result.verdict in _ALIVE and result.mutant.key in equivalent:
        return replace(result, verdict=Verdict.EQUIVALENT)
    return result


def _wrong_entries(results: list[Result], equivalent: dict[str, str]) -> list[str]:
    judged = {each.mutant.key: each for each in results}
    killed = [key for key in equivalent if key in judged and judged[key].verdict is not Verdict.EQUIVALENT]
    wrong = [f"{_GRACE} killed by {judged[key].killer}: {key}" for key in killed]
    return wrong + [f"{_GRACE} there is no such mutant: {key}" for key in equivalent if key not in judged]


def _line(result: Result) -> str:
    mutant = result.mutant
    where = f"{mutant.file}:{mutant.line}"
    end = f"  [{result.killer.rpartition('/')[2]}]" if result.killer else f"  ({result.tests} tests)"
    return f"{result.verdict:<16} {where:<48} {mutant.function}: {mutant.kind}: {mutant.text}{end}"


def _summary(results: list[Result]) -> str:
    packages = sorted({each.mutant.file.split("/")[2] for each in results})
    lines = ["", f"{'package':<12}" + "".join(f"{verdict:>18}" for verdict in Verdict)]
    for package in (*packages, ""):
        verdicts = [each.verdict for each in results if package in ("", each.mutant.file.split("/")[2])]
        counts = Counter(verdicts)
        lines.append(f"{package or 'all':<12}" + "".join(f"{counts[verdict]:>18}" for verdict in Verdict))
    return "\n".join(lines)


def _stored(judge: Judge, results: list[Result]) -> dict[str, object]:
    return {
        "first_run_s": round(judge.first_run_s, 2),
        "mutants_s": round(judge.mutants_s, 2),
        "mutants": [
            {
                "mutant": each.mutant.key,
                "line": each.mutant.line,
                "verdict": str(each.verdict),
                "tests": each.tests,
                "killer": each.killer,
            }
            for each in results
        ],
    }
