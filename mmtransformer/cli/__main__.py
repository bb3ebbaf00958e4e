"""`python -m mmtransformer.cli` is `mmt`."""

import sys

from mmtransformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
