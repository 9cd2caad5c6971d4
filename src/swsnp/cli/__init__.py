"""The command line: one module per verb, imported when its verb runs.

Exit codes: 0 good, 1 bad verdict, 2 usage, 3 unreadable input, 4 not possible on this host.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False  # `typing` itself would be an eighth of a short command's time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

__all__ = ["BAD_VERDICT", "GOOD", "NOT_HERE", "UNREADABLE", "USAGE", "main"]

GOOD: Final = 0
BAD_VERDICT: Final = 1
USAGE: Final = 2
UNREADABLE: Final = 3
NOT_HERE: Final = 4

_OBJECTS: Final = 20_000
"""New containers between two looks for cycles: a verb's modules are that many, and all of them stay."""

VERBS: Final = {
    "demo": "one attestation end to end, every hop shown and the report checked",
    "vm": "run a VM with QEMU's options and let its guest attest",
    "run": "run an unmodified program that finds a working /dev/sev-guest",
    "verify": "judge a report: is it genuine, and is it the one that is wanted?",
    "report": "explain a report field by field, or compare two",
    "certs": "certificates for operators: show and check them, build and replace blobs",
    "measure": "the launch digest of a guest, with sev-snp-measure's options",
    "kds": "the key service: imitate it, or fetch a fleet's certificates ahead",
    "id-block": "create, check and show the ID block that a launch has to match",
    "capabilities": "what this host and this build can do",
}


def _usage() -> str:
    lines = [f"  {verb:14}{text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: swsnp VERB [options]    (swsnp VERB --help for one verb)",
            "",
            "The AMD SEV-SNP attestation path in software. Its keys are software keys, never AMD's.",
            "",
            *lines,
            "",
            "exit codes: 0 good, 1 bad verdict, 2 usage, 3 unreadable input, 4 not possible on this host",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Without `argv` this is the program, which ends afterwards."""
    if argv is not None:
        return _main(list(argv))
    gc.set_threshold(_OBJECTS)
    code = _main(sys.argv[1:])
    gc.freeze()  # what is left dies with the process: looking for cycles in it takes a tenth of a command
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage())
        return GOOD if arguments else USAGE
    if arguments[0] == "--version":
        from swsnp._version import __version__

        print(f"swsnp {__version__}")
        return GOOD
    verb = arguments.pop(0)
    if verb not in VERBS:
        print(f"swsnp: no verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return USAGE
    return _run(verb, arguments)


def _run(verb: str, arguments: list[str]) -> int:
    from importlib import import_module

    from swsnp.errors import HostError, InputError, LayoutError, SwsnpError, UsageError

    codes: dict[type[SwsnpError], int] = {
        UsageError: USAGE,
        InputError: UNREADABLE,
        LayoutError: UNREADABLE,
        HostError: NOT_HERE,
    }
    module = import_module(f"swsnp.cli.{verb.replace('-', '_')}")
    try:
        code = module.run(arguments)
        sys.stdout.flush()
    except SwsnpError as error:
        _complain(verb, error, as_json="--json" in arguments)
        return next((code for kind, code in codes.items() if isinstance(error, kind)), BAD_VERDICT)
    except BrokenPipeError:
        # the reader has gone; keep the interpreter from complaining when it closes stdout
        sys.stdout = None
        return GOOD
    except KeyboardInterrupt:
        return 130
    return int(code)


def _complain(verb: str, error: Exception, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))
    print(f"swsnp {verb}: {error}", file=sys.stderr)
