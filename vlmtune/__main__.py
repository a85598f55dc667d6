"""`python -m vlmtune` is the console script `vlmtune`."""

from vlmtune.cli import main

if __name__ == "__main__":
    main()
