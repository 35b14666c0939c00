"""`python -m swarmpy_cli`: the same as the `swarmpy` command."""

from __future__ import annotations

import sys

from swarmpy_cli.main import main

sys.exit(main())
