"""`python -m sparvar_tune.cli`, as `sparvar-tune`."""

import sys

from sparvar_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
