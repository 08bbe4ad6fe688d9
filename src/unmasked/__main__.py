"""``python -m unmasked``: the same as the ``unmasked`` command."""

from unmasked.cli import main

if __name__ == "__main__":
    main()
