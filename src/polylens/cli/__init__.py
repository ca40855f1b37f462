"""The command line: `polylens enhance` and what goes with it.

Each command is thin: it parses, calls a public function and prints. Results go to stdout, progress
and logs to stderr. Exit codes: 0 done, 1 failure, 2 wrong usage or input,
3 failed gate, 130 interrupted.
"""

from polylens.cli.main import app, main

__all__ = ["app", "main"]
