"""The command line: one short module for each command, and what they share."""
