"""``python -m makeready`` is the command ``makeready``."""

from .cli import main

main()
