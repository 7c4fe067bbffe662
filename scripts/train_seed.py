"""Train a SEED tokenizer: `python scripts/train_seed.py stage1 --data.pack icons`."""

import sys

from polyzoo.core.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["seed", "train-tokenizer", *sys.argv[1:]]))
