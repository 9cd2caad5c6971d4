"""What `swsnp measure` shows beside the digest: every page, the difference of two guests, VMSA pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsnp.cli import BAD_VERDICT, GOOD, common
from swsnp.cli.measure import config_of, encode, ignored, parse
from swsnp.errors import UsageError
from swsnp.measure.explain import explain, first_difference
from swsnp.measure.launch_plan import launch_digest, vmsa_regions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from swsnp.measure.explain import Difference, Page, Run
    from swsnp.measure.launch_plan import LaunchConfig

__all__ = ["dump_vmsa", "run_diff", "run_explain"]


def run_explain(options: argparse.Namespace) -> int:
    """`--explain`: one line a run of equal pages."""
    config = config_of(options)
    runs = list(explain(config))
    if options.dump_vmsa:
        dump_vmsa(config)
    if options.json:
        shown = {
            "mode": options.mode,
            "measurement": runs[-1].digest.hex(),
            "ignored": ignored(options),
            "pages": sum(run.npages for run in runs),
            "runs": [_run_as_dict(run) for run in runs],
        }
        print(json.dumps(shown, indent=2))
    else:
        print(f"{'gpa':>14} {'pages':>6} type        what{'':22} digest after it")
        for run in runs:
            head = f"{run.gpa:>#14x} {run.npages:>6} {run.page_type.name:<11} {run.origin:<25}"
            print(f"{head} {run.digest.hex()}")
        print(encode(runs[-1].digest, options.output_format))
    return GOOD


def _run_as_dict(run: Run) -> dict[str, Any]:
    return {
        "gpa": run.gpa,
        "pages": run.npages,
        "type": run.page_type.name,
        "what": run.origin,
        "contents": run.contents.hex(),
        "digest": run.digest.hex(),
    }


def run_diff(arguments: Sequence[str]) -> int:
    """`swsnp measure diff A -- B`: exit code 0 when both are measured alike, else 1."""
    words = list(arguments)
    if "--" not in words:
        if {"-h", "--help"} & set(words):
            parse(["--help"])
        raise UsageError("diff: wanted one guest's options, --, and what the second has otherwise")
    at = words.index("--")
    first, second = (parse(each) for each in (words[:at], words[:at] + words[at + 1 :]))
    for options in (first, second):
        if options.mode not in ("snp", "snp:svsm") or options.snp_ovmf_hash:
            raise UsageError(f"diff: got mode {options.mode}, wanted whole guests of mode snp or snp:svsm")
    configs = [config_of(each) for each in (first, second)]
    found = first_difference(*configs)
    digests = [launch_digest(each).hex() for each in configs]
    if first.json or second.json:
        print(json.dumps({"measurements": digests, "difference": _as_dict(found)}, indent=2))
    else:
        print("\n".join(_as_lines(found, digests)))
    return GOOD if found is None else BAD_VERDICT


def _page_as_dict(page: Page | None) -> dict[str, Any] | None:
    if page is None:
        return None
    contents = page.contents.hex()
    return {"what": page.origin, "type": page.page_type.name, "gpa": page.gpa, "contents": contents}


def _as_dict(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "page": found.number,
        "first": _page_as_dict(found.first),
        "second": _page_as_dict(found.second),
        "reasons": found.reasons,
    }


def _as_lines(found: Difference | None, digests: Sequence[str]) -> Iterator[str]:
    yield f"first:  {digests[0]}"
    yield f"second: {digests[1]}"
    if found is None:
        yield "measured alike"
        return
    page = found.first or found.second
    assert page is not None  # noqa: S101  # a difference has at least one side
    yield f"page {found.number} differs: {page.origin}, {page.page_type.name}, gpa {page.gpa:#x}"
    for reason in found.reasons:
        yield f"  {reason}"


def dump_vmsa(config: LaunchConfig) -> None:
    """Write vmsa0.bin and so on into the working directory, each file whole or not at all."""
    for region in vmsa_regions(config):
        for number in range(region.npages):
            common.save(Path(f"vmsa{region.first + number}.bin"), region.page(number))
