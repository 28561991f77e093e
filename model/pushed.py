"""What ``push_to_hub`` of a model puts on the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cores.model.card import CARD, LIBRARY, WHOLE, model_card
from cores.model.checkpoints.source import PROCESSOR_FILE, Kind, Source
from cores.model.config import CoresConfig
from cores.model.hub import push_folder
from cores.model.processor import CoresProcessor


def card_for(config: CoresConfig, origin: Source | None) -> str:
    """The model card of a model that was read from ``origin``: the folder's own, which somebody may
    have edited, or a new one. The card of another author's model says nothing about ours."""
    if origin is None:
        return model_card(config)
    file = origin.file(CARD)
    text = file.read_text(encoding="utf-8") if file else ""
    if text and (origin.kind is Kind.CORES or f"library_name: {LIBRARY}\n" in text):
        return text
    return model_card(config, {} if origin.kind is Kind.CORES else {WHOLE: origin.name})


class PushedWhole(PreTrainedModel):
    """A model of transformers that is of use only with its processor: both are pushed at once,
    with the model card that belongs to these weights in place of an empty one."""

    config: CoresConfig
    origin: Source | None = None
    """What the model was read from; None for a new one."""

    def save_pretrained(self, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, into a folder. Raises ValueError for ``push_to_hub``."""
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True): knows no processor and card; call push_to_hub"
            )
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]  # One commit, with the processor.
        self,
        repo_id: str,
        *,
        processor: CoresProcessor | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "50GB",
        **commit: Any,
    ) -> str:
        """Puts model, processor and model card on the hub in one commit; returns its address.

        ``processor``: None for that of the folder which the model was read from, as is the card; a
        folder without one, and a new model, get a card from the config. ``commit``: ``revision``,
        ``create_pr``, ``commit_description``. Raises ValueError, one line, for a model that cannot
        be saved or has no processor, and where the hub cannot be reached or refuses.
        """
        origin = self.origin
        if processor is None:
            if origin is None or origin.file(PROCESSOR_FILE) is None:
                raise ValueError(f"{repo_id}: give the model's processor, too (processor=…)")
            processor = CoresProcessor.from_pretrained(origin)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            processor.save_pretrained(folder)
            commit |= {"private": private, "token": token, "card": card_for(self.config, origin)}
            message = commit_message or "Upload model"
            return push_folder(Path(folder), repo_id, message=message, **commit)
