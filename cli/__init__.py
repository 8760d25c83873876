"""The `influence` command: a translation of the command line into calls of the library."""
