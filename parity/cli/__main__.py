"""`python -m parity.cli`, for a machine without the script."""

from parity.cli import main

main()
