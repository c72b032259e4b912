"""`python -m foundation` is the command line, as `universal-ct` is."""

from foundation.cli import main

raise SystemExit(main())
