"""``python -m normsearch``, and ``normsearch``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback from the first moment on."""
    try:
        from normsearch.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
