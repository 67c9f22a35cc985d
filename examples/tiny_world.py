"""Write the demo's world and a small random Qwen3: everything that trying the commands needs, without a download.

    python examples/tiny_world.py world [--documents 400] [--seed 0]

    world/train.jsonl                pairs of a question and a document, Korean and English, about invented facts
    world/heldout-ko/ heldout-en/    BEIR folders: questions that are in no pair, and all documents
    world/model/                     a Qwen3 of three layers and width 128 with random weights, and its tokenizer

All of it is made up by this repository, under its licence; the same seed gives the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anchor_cli.demo.demo import Recipe, make_model
from anchor_cli.demo.world import make_world, write_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="The folder to make.")
    parser.add_argument("--documents", type=int, default=400, help="Documents of the world, 12 to 800.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs, benchmarks = write_world(make_world(args.seed, args.documents), args.out)
    make_model(args.out / "model", Recipe(seed=args.seed, num_documents=args.documents))
    for path in (pairs, *benchmarks, args.out / "model"):
        print(path)


if __name__ == "__main__":
    main()
