"""`python -m rethinker`: the same as the `rethinker` command."""

import sys

from rethinker.cli import main

sys.exit(main())
