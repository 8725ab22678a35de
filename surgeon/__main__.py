"""`python -m surgeon` is the `surgeon` command."""

import sys

from surgeon.cli import main

if __name__ == "__main__":
    sys.exit(main())
