"""`python -m tests.real_guest COMMAND ...`: run a command where Linux can be a guest, in a terminal's sight.

`make real-guest` fetches what it needs and runs the tests of this folder; this is for looking closer.
"""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.real_guest.place import here_or_nested

from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run; the command's exit status, 4 where it cannot run."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="real-guest.") as job:
        try:
            return here_or_nested().run(Path(job), shlex.join(arguments), timeout_s=3600)
        except HostError as error:
            print(f"real_guest: {error}", file=sys.stderr)
            return 4


if __name__ == "__main__":
    # as ^C does: the outer machine ends with this command
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
