"""`python -m lb` is `quiclb`."""

import sys

from lb.cli import main

sys.exit(main())
