"""`python -m c3_hf.cli`: the command without its entry point installed."""

import sys

from c3_hf.cli import main


sys.exit(main())
