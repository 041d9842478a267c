"""`python -m ldalign`, the same as `ldalign`."""

from ldalign.cli import main

main()
