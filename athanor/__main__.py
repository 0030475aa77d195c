"""`python -m athanor` is the command `athanor`."""

from athanor.cli.main import main

if __name__ == "__main__":
    main()
