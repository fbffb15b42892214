"""`python -m vlrt` is the `vlrt` command."""

import sys

from vlrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
