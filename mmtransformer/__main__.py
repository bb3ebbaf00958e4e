"""`python -m mmtransformer` is `mmt`, for where scripts are not in the path."""

import sys

from mmtransformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
