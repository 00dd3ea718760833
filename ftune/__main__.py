"""python -m ftune."""

from ftune.cli import main

if __name__ == "__main__":
    main()
