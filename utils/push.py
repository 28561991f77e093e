"""Puts a model folder on the hub, with its card.

    cores push --model runs/demo/model --repo me/demo --private

The folder is what merging wrote. Its README.md, the model card, may be edited before; a folder
without one gets the card that its config.json gives. The token is that of `hf auth login` or
HF_TOKEN.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.utils.settings.arguments import FlagParser
from cores.utils.settings.flags import UsageError


@command.entry(stopped="stopped; nothing was committed")
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files, or where the hub refuses."""
    parser = FlagParser("Put a model folder on the hub.", "python -m utils.push")
    parser.add_argument("--model", required=True, type=Path, help="folder that merging wrote")
    parser.add_argument("--repo", required=True, help="name of the repository, owner/name")
    parser.add_argument(
        "--private", action="store_true", help="make it a private one, if it is not there yet"
    )
    args = parser.parse_args(argv)
    from cores.model.card import CARD
    from cores.model.checkpoints.finished import loading_config
    from cores.model.checkpoints.source import open_source
    from cores.model.checkpoints.weights import shards, weight_file
    from cores.model.hub import push_folder
    from cores.model.processor import CoresProcessor
    from cores.model.pushed import card_for

    if not args.model.is_dir():
        raise UsageError(f"{args.model}: no such folder (--model)")
    source = open_source(args.model)
    config = loading_config(source)
    CoresProcessor.from_pretrained(source)  # Its errors are told before anything is sent.
    file = weight_file(args.model)
    lost = [p.name for p in (shards(file) if file.suffix == ".json" else []) if not p.is_file()]
    if lost:
        raise UsageError(f"{args.model}: {', '.join(lost)} missing; copy it again")
    card = None
    if not (args.model / CARD).is_file():
        card = card_for(config, source)
        print(f"{args.model}: has no {CARD}; the card of its config.json goes with it")
    address = push_folder(args.model, args.repo, card=card, private=args.private or None)
    print(f"{args.repo}: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
