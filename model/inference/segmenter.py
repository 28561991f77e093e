"""Ask a picture from Python.

    segmenter = ReasoningSegmenter.from_pretrained("runs/demo/model")
    result = segmenter("dog.jpg", "the part that lets the dog smell")
    result.text, result.masks[0].mask, result.overlay(), result.save("out")

    session = segmenter.open("dog.jpg")  # reads the picture once and remembers earlier turns
    session.ask("Where is the dog?")
    session.ask("And what does it hear with?")

H, W a picture in the original frame · K masks of an answer · T levels.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from cores.dataset.collate import Batch, collate_prompts
from cores.dataset.conversation import exemplars
from cores.dataset.conversation.encoding import encode_prompt
from cores.dataset.conversation.turns import Conversation, Turn, answer_from_ids, text_from_ids
from cores.dataset.files.errors import DataError
from cores.dataset.sample import Sample
from cores.model.checkpoints.precision import leave_small_layers
from cores.model.checkpoints.source import Source, open_source
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.inference.inputs import ImageLike, clean_question, clean_questions, load_image
from cores.model.inference.results import AnswerMask, Result, Stream
from cores.model.masks import EncodedImages, Generation, no_masks
from cores.model.processor import CoresProcessor
from cores.model.reasoning.generation import Decoding, KVCache, common_prefix, decode

Named = tuple[str, ImageLike]  # The text is what messages call the picture.
CONVERSATIONS_PER_PASS = 8  # Further questions about one picture take further passes.


class ReasoningSegmenter:
    """A model that answers questions about pictures in words and masks.

    ``max_new_tokens``: longest answer. The in-context exemplars of the prompt are drawn once, by
    ``seed``.
    """

    def __init__(
        self,
        model: CoresForReasoningSegmentation,
        processor: CoresProcessor,
        max_new_tokens: int = 64,
        seed: int = 0,
    ):
        self.decoding = Decoding(max_new_tokens)  # It refuses a wrong number before any change.
        self.model, self.processor = model.eval(), processor
        if processor.proposals is None:
            processor.proposals = model.proposal_source(None)
        self.exemplars = exemplars.draw_exemplars(
            np.random.default_rng(seed), processor.exemplar_count
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Source,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        template: str | None = None,
        max_new_tokens: int | None = None,
        vision_tower: str | None = None,
        proposals: str | Path | None = None,
        **kwargs: Any,
    ) -> ReasoningSegmenter:
        """A model folder, ours or a published LISA or CoReS, read as
        CoresForReasoningSegmentation.from_pretrained does, which takes ``vision_tower`` and
        ``kwargs``.

        The folder of a run stands for the model that was merged into its folder ``model``.
        ``kwargs``: also ``revision``, ``token`` and the like of a hub name.
        ``device`` "auto": CUDA where there is one, or the CPU. ``dtype`` "auto": as stored.
        ``template``: of the prompt, instead of that of the training. ``max_new_tokens``: None for
        what generation_config.json says. ``proposals``: folder of the proposal store of a model
        that selects; what it lacks is computed, and kept there. Raises FileNotFoundError or
        ValueError for a folder that holds no such model.
        """
        source = open_source(_merged(path), vision_tower, **kwargs)
        processor = CoresProcessor.from_pretrained(source)
        processor.template = template or processor.template
        model = CoresForReasoningSegmentation.from_pretrained(source, dtype=dtype, **kwargs)
        if kwargs.get("quantization_config") is None:  # Packed weights are on their device already.
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            torch.nn.Module.to(model, device)  # transformers' own ``to`` has no usable annotation.
        leave_small_layers(model)
        processor.proposals = model.proposal_source(proposals)
        stored = model.generation_config.max_new_tokens or 64
        return cls(model, processor, stored if max_new_tokens is None else max_new_tokens)

    def __call__(
        self, image: ImageLike | Sequence[ImageLike], query: str | Sequence, batch_size: int = 4
    ) -> Any:
        """The answer to ``query`` about ``image``, a Result; the questions of a list are separate
        conversations.

        One picture and a list of questions give a list of Results. Several pictures take one
        question for all, or a list with one question, or one list of questions, for each; the
        Results are nested as the questions are. ``batch_size``: pictures in one pass. Raises
        DataError or ValueError, naming the picture, for bad input.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
        if not isinstance(image, (list, tuple)):
            one = cast(ImageLike, image)  # load_image refuses any other sequence.
            (results,) = self._answer_all([("image", one)], [clean_questions(query)], batch_size)
            return results[0] if isinstance(query, str) else results
        if not isinstance(query, (str, list, tuple)):
            raise ValueError(
                "query: give a text for all images or a list with an entry for each, got"
                f" {type(query).__name__}"
            )
        queries = [query] * len(image) if isinstance(query, str) else query
        if len(queries) != len(image):
            raise ValueError(
                f"{len(image)} images but {len(queries)} entries of questions; give one for each"
                " image"
            )
        asked = [clean_questions(q, f"query[{number}]") for number, q in enumerate(queries)]
        answers = self._answer_all(
            [(f"image[{number}]", one) for number, one in enumerate(image)], asked, batch_size
        )
        return [
            found[0] if isinstance(q, str) else found
            for q, found in zip(queries, answers, strict=True)
        ]

    def stream(self, image: ImageLike, query: str) -> Stream:
        """As a call with one picture and one question, but the text comes in pieces."""
        return Session(self, *load_image(image)).stream(query)

    def open(self, image: ImageLike) -> Session:
        """A conversation about one picture, which is read now."""
        session = Session(self, *load_image(image))
        session.read_ahead()
        return session

    def _answer_all(
        self, images: list[Named], queries: list[list[str]], batch_size: int
    ) -> list[list[Result]]:
        answers: list[list[Result]] = [[] for _ in images]
        parts = (
            (index, questions[start : start + CONVERSATIONS_PER_PASS])
            for index, questions in enumerate(queries)
            for start in range(0, len(questions), CONVERSATIONS_PER_PASS)
        )
        while some := list(islice(parts, batch_size)):
            loaded = [(*load_image(images[i][1], images[i][0]), asked) for i, asked in some]
            batch, tokenizer = self.collate(loaded), self.processor.tokenizer
            generated = iter(self.model.generate(batch, tokenizer, **vars(self.decoding)))
            for (index, _), (pixels, name, asked) in zip(some, loaded, strict=True):
                for question in asked:
                    answers[index].append(self.result(pixels, name, question, next(generated)))
        return answers

    def collate(self, images: list[tuple[np.ndarray, str, list[str]]]) -> Batch:
        """A batch of prompts on the model's device; ``images``: pixels uint8 (H, W, 3) RGB, name
        and questions of each."""
        samples = []
        for pixels, name, questions in images:
            nothing = np.zeros((0, *pixels.shape[:2]), dtype=bool)
            asked = [Conversation([(question, [])], nothing) for question in questions]
            identity = "chat", "chat", Path(name).name
            samples.append(Sample(pixels, name, asked, *identity, self.exemplars))
        p = self.processor
        batch = collate_prompts(samples, p, p.levels, p.conversation)
        return batch.to(self.model.device, self.model.dtype)

    def result(
        self, image: np.ndarray, name: str, question: str, answer: Generation, forgotten: int = 0
    ) -> Result:
        """The Result of a generated answer; ``forgotten``: turns that were left out for it."""
        levels = self.processor.levels
        masks = [
            AnswerMask(dict(zip(levels, group, strict=True)), dict(zip(levels, ious, strict=True)))
            for group, ious in zip(answer.masks.cpu().numpy(), answer.iou.tolist(), strict=True)
        ]
        text, ids = self.text(answer.token_ids), answer.token_ids
        finished, named = answer.finished, tuple(levels)
        return Result(image, name, question, text, masks, ids, finished, forgotten, named)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as people read them."""
        return text_from_ids(ids, self.processor.tokenizer, self.processor.levels)


def _merged(path: str | Path | Source) -> str | Path | Source:
    """The folder ``model`` of a run folder that has one; any other ``path`` itself."""
    if isinstance(path, Source) or not (Path(path) / "ckpt").is_dir():
        return path
    merged = Path(path) / "model"
    return merged if (merged / "config.json").is_file() else path


class Session:
    """A conversation about one picture. It keeps the image embedding (or what a selector looks at,
    and the proposals), CLIP's features and the KV cache, so that a further question costs its own
    tokens only.

    ``turns`` are the (question, answer) pairs that the next question will see. An answer that is
    interrupted leaves the conversation as it was.
    """

    @torch.no_grad()
    def __init__(self, segmenter: ReasoningSegmenter, image: np.ndarray, name: str):
        """image: uint8 (H, W, 3) RGB; see ReasoningSegmenter.open."""
        self.segmenter, self.image, self.name = segmenter, image, name
        self.turns: list[Turn] = []
        model, processor = segmenter.model, segmenter.processor
        sam_pixels, self._resized = processor.sam(image)
        clip_pixels = processor.clip(image)[None].to(model.device, model.dtype)
        self._sam_pixels: torch.Tensor | None = sam_pixels[None].to(model.device, model.dtype)
        self._features = model.reasoning.image_features(clip_pixels)
        self._cache = KVCache(model.reasoning)
        self._cached_ids: list[int] = []
        """Token ids that the KV cache holds."""
        # A stream has its session. If this had the stream, too, a session that ends in the middle
        # of an answer would stay until Python looks for circles.
        self._running: weakref.ref[Stream] | None = None
        self.prompt_tokens = 0
        """Of the last question: its prompt, with exemplars, picture and history."""

    def ask(self, question: str) -> Result:
        """The answer; it stands in the history of the next question if it has words.

        Where the conversation does not fit any more, its oldest turns are forgotten;
        ``Result.forgotten_turns`` counts them. Raises ValueError for a question that is empty or
        too long on its own.
        """
        return self.stream(question).result

    def stream(self, question: str) -> Stream:
        """As ``ask``, in pieces of text. A stream of this session that is still running is given
        up."""
        self._give_up()
        stream = Stream(self._answer(question))
        self._running = weakref.ref(stream)
        return stream

    def undo(self) -> str | None:
        """Takes the last turn back and returns its question; None where there is none."""
        self._give_up()
        return self.turns.pop()[0] if self.turns else None

    def reset(self) -> None:
        """Forgets the conversation, not the picture."""
        self._give_up()
        self.turns = []

    def _give_up(self) -> None:
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()

    @torch.no_grad()
    def read_ahead(self) -> None:
        """Reads now what every question shares: the prompt up to the picture, and the picture for
        the masks."""
        ids = self._encode("?", [])
        last = len(ids) - 1 - ids[::-1].index(self.segmenter.processor.image_token_id)
        self._prefill(ids[: last + 1])
        _ = self._images

    @cached_property
    def _images(self) -> EncodedImages:
        """The picture as the mask branch needs it, encoded for the first mask or by read_ahead, and
        its proposals for a selector."""
        segmenter, pixels, proposals = self.segmenter, self._sam_pixels, None
        assert pixels is not None
        if segmenter.processor.proposals is not None:
            found = segmenter.processor.proposals(self.image, self.name)
            proposals = [found.to(segmenter.model.device)]
        sizes = [(self.image.shape[0], self.image.shape[1])], [self._resized]
        images = segmenter.model.mask_branch.encode(pixels, *sizes, proposals)
        self._sam_pixels = None  # 12 MB that are not needed again.
        return images

    def _encode(self, question: str, history: Sequence[Turn]) -> list[int]:
        p, exemplars = self.segmenter.processor, self.segmenter.exemplars
        image = p.image_token, p.image_token_count
        return encode_prompt(
            question, history, exemplars, p.tokenizer, p.conversation, *image, p.levels
        )

    def _fit(self, question: str) -> tuple[list[Turn], list[int]]:
        """(history, token ids) of the prompt, without as many of the oldest turns as it takes to
        leave room to answer."""
        limit = self.segmenter.processor.tokenizer.model_max_length
        for start in range(len(self.turns) + 1):
            history = self.turns[start:]
            ids = self._encode(question, history)
            room = limit - self.segmenter.decoding.max_new_tokens if history else limit
            if len(ids) <= room:
                return history, ids
        raise DataError(
            f"the question is too long: {len(ids)} tokens with its prompt, the model takes {limit};"
            " shorten it"
        )

    def _prefill(self, ids: list[int]) -> torch.Tensor:
        """Hidden states (1, d) at the end of ``ids``. What the KV cache holds of them is not read
        again."""
        reasoning = self.segmenter.model.reasoning
        shared = min(common_prefix(self._cached_ids, ids), len(ids) - 1)
        self._cached_ids = self._cached_ids[:shared]
        self._cache.crop(shared)
        tokens = torch.tensor([ids], device=self._features.device)
        embeddings = reasoning.embed(tokens, self._features, torch.zeros_like(tokens[:, 0]))
        hidden = self._cache.extend(embeddings[:, shared:], torch.ones_like(tokens[:, shared:]))
        self._cached_ids = list(ids)
        return hidden[:, -1]

    @torch.no_grad()
    def _answer(self, question: str) -> Generator[str, None, Result]:
        segmenter, model = self.segmenter, self.segmenter.model
        p, end = segmenter.processor, segmenter.processor.tokenizer.eos_token_id
        question = clean_question(question)
        history, ids = self._fit(question)
        self.prompt_tokens = len(ids)
        hidden = self._prefill(ids)
        generated: list[int] = []
        states = [hidden[:0]]
        shown, finished = "", False
        for token, state in decode(self._cache, hidden, end, segmenter.decoding, [ids]):
            self._cached_ids = ids + generated  # Every token is read before the next is chosen.
            finished = int(token) == end
            if finished:
                break
            generated.append(int(token))
            states.append(state)
            # A character may take several tokens.
            ready = segmenter.text(generated).rstrip("\ufffd")
            if ready.startswith(shown) and ready != shown:
                yield ready[len(shown) :]
                shown = ready
        text = segmenter.text(generated)
        if text != shown:
            yield text[common_prefix(text, shown) :]
        prompts, counts = model.group_prompts([torch.cat(states)], [generated])
        if len(prompts):
            index = torch.zeros(1, dtype=torch.int64, device=prompts.device)
            (found,) = model.mask_branch.segment(prompts, counts, index, self._images)
        else:
            found = no_masks(len(p.levels), self.image.shape[:2], prompts.device)
        answer = Generation(found.masks, found.iou, generated, text, finished)
        forgotten = len(self.turns) - len(history)
        result = segmenter.result(self.image, self.name, question, answer, forgotten)
        reply = answer_from_ids(generated, p.tokenizer, p.levels)
        self.turns = [*history, (question, reply)] if text else history
        return result
