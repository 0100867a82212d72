"""`python -m chunkft`."""

from chunkft.cli import main

raise SystemExit(main())
