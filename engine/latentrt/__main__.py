"""`python -m latentrt`: the command."""

from latentrt.command.main import main

main()
