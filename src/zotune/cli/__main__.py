"""`python -m zotune.cli`."""

from zotune.cli import main

if __name__ == "__main__":
    main()
