"""Command line of the benchmarks: `python -m vitgraph.bench towers`, `scaling`, `plot`, ..."""

import sys
from collections.abc import Sequence

from .arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its table goes to stdout, progress to stderr.

    Returns:
        0, 1 if a section of `capture` failed, or 2 for an argument that has no such value.
    """
    arguments = parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else list(argv)
    # after parsing: --help must not wait for transformers
    from .commands import MEASURING, PRINTING
    from .provenance import sources
    from .report import conditions, write_content, write_json

    try:
        if arguments.command in PRINTING:
            print(PRINTING[arguments.command](arguments))
            return 0
        made_of = sources()  # before anybody edits them, and before a wrong VITGRAPH_COMMIT costs
        rows, extra, text = MEASURING[arguments.command](arguments)
    except ValueError as error:
        print(f"vitgraph {error}", file=sys.stderr)
        return 2
    samples = extra.pop("samples", None)
    target = arguments.json
    if target or samples:
        meta = {**conditions(["vitgraph", "bench", *given], made_of), **extra}
        if target:
            write_json(target, meta, rows)
        if samples:
            write_content(arguments.samples, {**meta, "samples": samples})
    print(text)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
