"""`python -m anchor_cli` is `anchor`."""

from anchor_cli.cli import main

if __name__ == "__main__":
    main()
