"""For an interpreter without its lock, as `make free-threaded` builds one; others do not collect these."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if "t" in sys.abiflags else ["test_*.py"]
