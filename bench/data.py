"""Command: see `bench.feed.command`."""

import sys

from bench.feed.command import main

if __name__ == "__main__":
    sys.exit(main())
