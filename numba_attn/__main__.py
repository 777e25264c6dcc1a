"""`python -m numba_attn` is the same as the `numba-attn` script."""

import sys

from numba_attn.app.cli import main

sys.exit(main())
