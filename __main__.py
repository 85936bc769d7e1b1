"""``python -m makeready`` is the command ``makeready``."""

from .cli import main

if __name__ == "__main__":  # processes that a benchmark starts import this file under another name
    main()
