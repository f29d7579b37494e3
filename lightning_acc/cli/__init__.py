"""The command line ``lightning-acc``."""

from lightning_acc.cli.main import main

__all__ = ["main"]
