"""`python -m miniclip` is the `miniclip` command."""

from .commands.main import main

if __name__ == "__main__":
    main()
