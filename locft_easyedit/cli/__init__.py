"""The command line: `locft edit`, `locft run`, `locft demo`."""
