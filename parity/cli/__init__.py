"""The command line: `commands` has the commands, `process` what surrounds one, `console` what they say."""

from parity.cli.process import main

__all__ = ["main"]
