"""`python -m salience` is the command line."""

from salience.cli import main

main()
