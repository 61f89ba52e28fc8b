"""Put the log of a training into the folder of the demo model that came of it.

    python scripts/add_training_log.py runs/train-llava/log.jsonl data/demo-lvlm

writes ``training.parquet`` into the model's folder, from which ``capa-probe figures`` draws how it was trained, for
models that were trained before ``scripts/train_demo_lvlm.py`` wrote it. Nothing is trained; no other file is changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from demo_training.training_table import read_log, write_training


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="log.jsonl of the training")
    parser.add_argument("model", type=Path, help="folder of the model that came of it")
    arguments = parser.parse_args(argv)
    if not arguments.log.is_file():
        parser.error(f"{arguments.log} is not there; give the log.jsonl of a training.")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} holds no model; give the folder that the training wrote.")
    try:
        log = read_log(arguments.log)
    except ValueError as error:
        parser.error(str(error))
    print(write_training(log, arguments.model))


if __name__ == "__main__":
    main()
