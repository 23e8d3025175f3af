"""`python -m orpo_kernels` is `orpo-kernels`."""

import sys

from orpo_kernels.cli import main

sys.exit(main())
