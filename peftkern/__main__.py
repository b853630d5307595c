"""`python -m peftkern` is the command line."""

from peftkern.cli import main

if __name__ == "__main__":
    main()
