"""Provide the `img2parquet` command."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see `console.main`."""
    from img2parquet.cli.console import main as run_command

    return run_command(argv)
