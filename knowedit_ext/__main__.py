"""`python -m knowedit_ext`: the `knowedit` command."""

from knowedit_ext.cli import main

if __name__ == "__main__":
    main()
