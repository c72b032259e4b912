"""`python -m foundation` is the command line, as `universal-ct` is."""

from foundation.cli.main import main

raise SystemExit(main())
