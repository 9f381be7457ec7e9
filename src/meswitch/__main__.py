"""`python -m meswitch` is the command `meswitch`."""

from meswitch.cli import main

if __name__ == "__main__":
    main()
