"""`python -m zotune`: the command line."""

from zotune.cli import main

if __name__ == "__main__":
    main()
