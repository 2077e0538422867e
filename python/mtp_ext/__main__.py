"""Runs ``mtp`` as ``python -m mtp_ext``."""

import sys

from mtp_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
