"""Command line: ``saelens-asi COMMAND``, one module each; the way in is ``saelens_asi_cli``, which imports no torch."""

from saelens_asi_cli import COMMANDS, main

__all__ = ["COMMANDS", "main"]
