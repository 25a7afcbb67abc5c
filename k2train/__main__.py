"""`python -m k2train`, which is what torchrun's `-m k2train` starts on every rank."""

import sys

from k2train.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
