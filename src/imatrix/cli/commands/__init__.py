"""A module for each command, named as it is; each offers COMMAND (see imatrix.cli.command)."""
