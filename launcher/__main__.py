"""``python -m launcher``: the same as the command ``convoy``."""

from launcher.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
