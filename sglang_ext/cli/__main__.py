"""`python -m sglang_ext.cli` is `sglang-ext`."""

import sys

from sglang_ext.cli.main import main

sys.exit(main())
