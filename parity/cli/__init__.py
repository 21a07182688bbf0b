"""The command line: `parity.cli.commands` has the commands, `parity.cli.console` what they say."""

from parity.cli.commands import main

__all__ = ["main"]
