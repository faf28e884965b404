"""``python -m normsearch``."""

from normsearch.cli import main

if __name__ == "__main__":
    main()
