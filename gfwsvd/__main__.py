"""`python -m gfwsvd` is the command `gfwsvd`."""

from .cli import main

if __name__ == "__main__":
    main()
