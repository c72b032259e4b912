"""`python -m foundation.cli` is the command line, as `universal-ct` is."""

from foundation.cli.main import main

raise SystemExit(main())
