"""`python -m lossmith`: the command `lossmith`, where several Pythons are installed."""

from lossmith.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
