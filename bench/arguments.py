"""The options of every benchmark command."""

import argparse

DTYPES = ("bfloat16", "float16", "float32")
DESCRIPTION = "Measure vitgraph and its peers; the same as `python -m vitgraph.bench`."


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` names what was asked for."""
    whole = argparse.ArgumentParser(prog="vitgraph bench", description=DESCRIPTION)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    towers = add("towers", "whole towers against their competitors")
    towers.add_argument("--providers", nargs="+", metavar="NAME")
    towers.add_argument(
        "--compile", action="store_true", help="add hf-compile-graph (minutes for each workload)"
    )
    peers = add("peers", "towers with every peer that is installed here; says what is missing")
    for command in (towers, peers):
        command.add_argument("--workloads", nargs="+", metavar="NAME", help="or mix<N>: N images")
        command.add_argument(
            "--budgets",
            choices=("auto", "ladder", "tight"),
            default="auto",
            help="graphs of `ours`: rungs of the automatic ladder that are used, all, or exact",
        )
    scaling = add("scaling", "latency against tokens, images, and the occupancy of a rung")
    scaling.add_argument("--axes", nargs="+", metavar="NAME", help="default: all three")
    scaling.add_argument("--providers", nargs="+", metavar="NAME")
    scaling.add_argument("--max-tokens", type=int, metavar="N", help="of the largest image")
    scaling.add_argument("--max-images", type=int, metavar="N", help="in the largest call")
    scaling.add_argument("--rung", type=int, metavar="TOKENS", help="whose occupancy varies")
    kernels = add("kernels", "single kernels against the roofline")
    kernels.add_argument("cases", nargs="*", metavar="CASE")
    kernels.add_argument("--shapes", metavar="TEXT", help="only shapes whose label holds TEXT")
    capture = add("capture", "the capture manager on one tower")
    capture.add_argument("--tower", metavar="NAME", help="default: qwen3-vl-8b")
    capture.add_argument("--sections", nargs="+", metavar="NAME", help="default: all of them")
    capture.add_argument("--layouts", type=int, metavar="N", help="random layouts for dispatch")
    capture.add_argument("--attention", metavar="BACKEND", help="default: the tower's own choice")
    capture.add_argument("--samples", metavar="FILE", help="write what calibration measured")
    breakdown = add("breakdown", "where the time of a call goes: kernels, gaps, and around them")
    breakdown.add_argument("--towers", nargs="+", metavar="NAME")
    breakdown.add_argument("--workloads", nargs="+", metavar="NAME", help="default: img224")
    breakdown.add_argument("--attention", metavar="BACKEND", help="default: the tower's own choice")
    breakdown.add_argument("--precision", choices=("native", "fp8"), default="native")
    images = add("images", "towers of images (Step, SigLIP 2, InternVL) against Hugging Face's")
    images.add_argument("--towers", nargs="+", metavar="NAME", help="default: all of them")
    images.add_argument("--workloads", nargs="+", metavar="NAME", help="default: all of each tower")
    images.add_argument("--providers", nargs="+", metavar="NAME")
    packing = add("packing", "padding that packing leaves; runs nothing")
    tune = add("tune", "launch tables: the library against our tiles, and tiles of attention")
    tune.add_argument("--shapes", nargs="+", metavar="TEXT", help="only labels that hold a TEXT")
    tune.add_argument(
        "--rows", nargs="+", type=int, metavar="N", help="patches in a batch; default: the table's"
    )
    tune.add_argument(
        "--print", action="store_true", help="print the literals of kernels/*_tuning.py"
    )
    products = add("products", "what computes each layer, by the time of whole captured towers")
    products.add_argument("--towers", nargs="+", metavar="NAME")
    products.add_argument(
        "--rows", nargs="+", type=int, metavar="N", help="patches in a batch; default: 128 256"
    )
    products.add_argument(
        "--images", type=int, default=1, metavar="N", help="that share them; default: 1"
    )
    products.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="of qkv, proj, up and down those to exchange, or norm2; the others stay as they are",
    )
    products.add_argument(
        "--turns", type=int, default=2, metavar="N", help="of each layer; default: 2"
    )

    for command in (towers, peers, scaling):
        command.add_argument("--towers", nargs="+", metavar="NAME")
        attention = command.add_mutually_exclusive_group()
        attention.add_argument(
            "--attention", metavar="BACKEND", help="of `ours`; default: its own choice"
        )
        attention.add_argument(
            "--plain",
            action="store_true",
            help="`ours` as it is without any package of FlashAttention",
        )
    for command in (towers, peers, scaling, images, tune, products):
        command.add_argument(
            "--budget-s", type=float, metavar="SECONDS", help="start nothing new after that"
        )
    for command in (towers, peers, scaling, images, kernels):
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        command.add_argument("--device", help="default: the GPU if there is one")
    products.add_argument("--seed", type=int, default=0)
    for command in (towers, peers, scaling, images, kernels, capture, breakdown):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--quick", action="store_true", help="fewer repetitions and points")
    measured = (
        towers,
        peers,
        scaling,
        images,
        kernels,
        capture,
        breakdown,
        packing,
        tune,
        products,
    )
    for command in measured:
        command.add_argument("--json", metavar="FILE", help="write conditions and rows")

    plot = add("plot", "SVG plots of results of `scaling` and `kernels`")
    plot.add_argument("files", nargs="+", metavar="RESULT.json")
    plot.add_argument("-o", "--output", required=True, metavar="FOLDER")
    readme = add("readme", "the README's table, from a result of `towers`")
    readme.add_argument("file", metavar="FILE")
    readme.add_argument("--plain-file", metavar="FILE2", help="a result of `towers --plain`")
    digest = add("digest", "the digest of the package sources that results carry")
    digest.add_argument("commit", nargs="?", metavar="COMMIT", help="default: the files here")
    return whole
