import sys

from sparvar_tune.cli import main

sys.exit(main())
