import sys

from sparvar_tune.cli.parser import main

sys.exit(main())
