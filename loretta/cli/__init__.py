"""The `loretta` command line: modules with a `run` for the commands, and what they share."""
