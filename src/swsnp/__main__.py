"""`python -m swsnp`."""

import sys

from swsnp.cli import main

sys.exit(main())
