"""Command: see `bench.ops.run`."""

import sys

from bench.ops.run import main

if __name__ == "__main__":
    sys.exit(main())
