"""The `loretta` command line: modules with a `run` for the commands, and what they share.

Whatever the user gave and cannot be used is a UserError, which `loretta.__main__` prints as one line.
"""
