"""`python -m bertdist` is the command `bertdist`."""

from bertdist.cli import main

if __name__ == "__main__":
    main()
