"""The command line: words and pictures; each command is one short module."""
