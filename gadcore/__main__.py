"""python -m gadcore: the command line of gadcore.run."""

from gadcore.run import program

program()
