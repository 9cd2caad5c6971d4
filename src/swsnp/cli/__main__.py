"""`python -m swsnp.cli`."""

import sys

from swsnp.cli import main

sys.exit(main())
