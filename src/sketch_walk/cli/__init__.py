"""The `sketch-walk` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sketch_walk.extras import require


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    A mistake of the user ends in one line on standard error: exit code 2 for a wrong option, 1 for anything else.

    Parameters
    ----------
    arguments : sequence of str, optional
        None takes those of the process.

    Raises
    ------
    SystemExit
        Always.
    """
    try:
        require("typer", "eval")
        require("rich", "eval")
        from sketch_walk.cli.app import app

        given = sys.argv[1:] if arguments is None else list(arguments)
        app(given, prog_name="sketch-walk", obj=given)
    except (ImportError, OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"sketch-walk: {message}", file=sys.stderr)
        raise SystemExit(1) from None
