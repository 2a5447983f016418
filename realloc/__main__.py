"""`python -m realloc` is the command line."""

import sys

from realloc.cli import main

if __name__ == "__main__":
    sys.exit(main())
