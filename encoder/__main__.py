"""`python -m vitgraph.encoder`, and the `vitgraph` command."""

from .cli import main

if __name__ == "__main__":
    main()
