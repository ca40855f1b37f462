"""`python -m polylens`: the command line, as launchers such as torchrun start it."""

from polylens.cli import main

if __name__ == "__main__":
    main()
