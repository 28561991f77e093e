"""A web page around a model: drop a picture, ask, see how the answer was found.

    .venv-app/bin/python app.py --version runs/demo/model     # then open the address it prints

The page is for this machine alone unless --host says otherwise. docs/app.md has more.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any, NoReturn

from cores.dataset import command
from cores.utils.settings.programs import read_page

if __name__ == "__main__":
    command.guard(read_page)

import numpy as np
from PIL import Image

from cores.chat import MISTAKES, remarks
from cores.dataset.command import one_line
from cores.dataset.drawing import fit, level_colour, overlay
from cores.dataset.files.errors import DataError
from cores.dataset.files.images import read_image
from cores.dataset.files.text import read_json
from cores.dataset.synthetic import write as synthetic
from cores.model.inference.results import Result
from cores.utils import distributed
from cores.utils.asking import LESS_MEMORY, load_segmenter
from cores.utils.report.gallery import encode_jpeg
from cores.utils.report.html import TEMPLATES
from cores.utils.serving.folder import ServedFolder
from cores.utils.serving.guard import Guard
from cores.utils.serving.line import Line, Visitor
from cores.utils.serving.visitors import FORGET_AFTER, MOST_ANSWERS, VisitorChat, Visitors
from cores.utils.settings.flags import UsageError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ANSWER, CHAIN, PICTURE = "answer", "whole chain", "picture only"  # views, beside those of a level
# Pixels of the longer side as shown: a small picture is enlarged, so that outlines stay thin.
SIDES = (640, 1280)
TILE = 320
OPACITY = 45  # percent
QUESTION_LENGTH = 1000  # characters
MOST_LOOKS = 8  # views of one visitor that wait to be painted
DOWNLOADS = "downloads-"  # begins the names of folders with files to download
SWEEP_EVERY = 30  # seconds
# What gradio itself keeps of a page: no more than what it shows, so that nothing is lost with it.
GRADIO_SESSIONS = 256
GRADIO_JOBS = 32  # beside the questions that wait
CSS = """
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; min-height: 22px; }
.legend i {
  display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px;
}
.chain { display: flex; gap: 10px; }
.chain figure { margin: 0; flex: 1 1 0; min-width: 0; max-width: 33%; }
.chain img { width: 100%; border-radius: 6px; margin: 0; }
.chain figcaption { font-size: 13px; margin-top: 4px; }
/* On a phone, where one column follows the other, the answer comes before the examples. */
@media (max-width: 640px) {
  #asking, #answering { display: contents; }
  #examples { order: 1; }
}
"""
ON_ITS_WAY = "An answer is on its way; stop it first, or wait for its end."
INTRODUCTION = (
    "Drop a picture, ask about it, and see where the answer is. The model first marks **where to"
    " look**, then **what was meant**. A further question is read together with the ones before."
)


# The answer's level masks side by side, coarse to fine, after the picture itself.
STEPS = TEMPLATES.from_string("""
<div class="chain">
{% for caption, jpeg in tiles %}
<figure><img src="{{ jpeg | data_uri }}" alt="{{ caption }}" loading="lazy">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>""")
LEGEND = TEMPLATES.from_string("""
<div class="legend">
{% for (red, green, blue), text in entries %}
<span><i style="background: rgb({{ red }}, {{ green }}, {{ blue }})"></i>{{ text }}</span>
{% else %}
<span>No mask: {{ reason }}.</span>
{% endfor %}
</div>""")


def import_gradio(cache: Path) -> Any:
    """The library, set up to keep its files in ``cache`` and to send no telemetry. Raises
    UsageError where it is not installed."""
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        # An ImportError inside an installed gradio is another mistake, which shows its trace.
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise UsageError(
            'the page needs the package gradio: pip install "cores[app]", or in a clone run'
            " scripts/setup.sh app, and this with .venv-app/bin/python (docs/app.md)"
        ) from None
    return gradio


def shown_side(image: np.ndarray) -> int:
    """Pixels of the longer side at which a picture, uint8 (H, W, 3), is shown."""
    return int(np.clip(max(image.shape[:2]), *SIDES))


def level_names(result: Result) -> list[str]:
    """Coarse to fine; none for an answer without a mask."""
    return list(result.masks[0].levels) if result.masks else []


def paint(result: Result, view: str, alpha: float, side: int) -> np.ndarray:
    """uint8 RGB with a longer side of ``side``: the picture under the masks of ``view``, which is
    ANSWER, CHAIN, PICTURE or the name of a level; ``alpha`` in [0, 1]."""
    out, names = fit(result.image, side), level_names(result)
    wanted = {CHAIN: names, ANSWER: names[-1:], PICTURE: []}.get(view, [view])
    for found in result.masks:
        for level, (name, mask) in enumerate(found.levels.items()):
            if name in wanted and mask.any():
                out = overlay(out, fit(mask, side), level_colour(level, len(names)), alpha)
    return out


def steps(result: Result, alpha: float) -> str:
    """HTML of the chain, coarse to fine: the picture and one tile for every level; "" without a
    mask."""
    names = level_names(result)
    if not names:
        return ""
    views = {PICTURE: "the picture"}
    for i, name in enumerate(names, start=1):
        meaning = "the answer" if i == len(names) else "where to look"
        views[name] = f"{i}. [{name}] {meaning}"
    return STEPS.render(
        tiles=[
            (caption, encode_jpeg(paint(result, view, alpha, TILE)))
            for view, caption in views.items()
        ]
    )


def legend(result: Result | None) -> str:
    """HTML that says what the colours stand for, and how good SAM believes the masks to be."""
    if result is None:
        return ""
    entries = []
    for number, found in enumerate(result.masks, start=1):
        which = f" {number}" if len(result.masks) > 1 else ""
        for level, (name, mask) in enumerate(found.levels.items()):
            area, iou = f"{100 * mask.mean():.1f} % of the picture", f"{found.ious[name]:.2f}"
            if not mask.any():
                area = "empty, no pixel was marked"
            text = f"[{name}]{which}: {area}, predicted IoU {iou}"
            entries.append((level_colour(level, len(found.levels)), text))
    return LEGEND.render(entries=entries, reason=result.why_no_mask)


def write_downloads(result: Result, folder: Path) -> tuple[str, str]:
    """Writes masks.zip, the PNG of every mask of every level and the overlay, and coco.json into a
    new folder inside ``folder``; returns their paths. The answer must have a mask."""
    assert result.masks, "only an answer with a mask can be downloaded"
    target = Path(tempfile.mkdtemp(prefix=DOWNLOADS, dir=folder))
    result.save(target / "files")
    with zipfile.ZipFile(target / "masks.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((target / "files").iterdir()):
            archive.write(path, path.name)
    shutil.rmtree(target / "files")
    coco = json.dumps(result.to_coco() | {"answer": result.text})
    (target / "coco.json").write_text(coco, encoding="utf-8")
    return str(target / "masks.zip"), str(target / "coco.json")


def limit_pixels(megapixels: int) -> None:
    """Every reader of pictures keeps Pillow's limit, which is one for data sets: 89 million."""
    Image.MAX_IMAGE_PIXELS = megapixels * 10**6


def read_examples(path: Path | None, folder: Path) -> list[list[str]]:
    """[path, question] pairs: those of a JSON, or of scenes drawn into ``folder``. Raises DataError
    naming file and entry."""
    if path is None:
        return [_draw_example(number, folder) for number in range(3)]
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(
            f'{path}: must be a list of {{"image": path, "question": text}} (--examples)'
        )
    found = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("image", "question")
        ):
            raise DataError(f'{path}: [{i}] needs "image" and "question" (--examples)')
        image = path.parent / entry["image"]
        read_image(image)
        found.append([str(image), entry["question"]])
    return found


def _draw_example(number: int, folder: Path) -> list[str]:
    rng = synthetic.scene_rng(0, "val", number)
    scene = synthetic.make_scene(rng)
    path = folder / f"example-{number + 1}.png"
    Image.fromarray(scene.image).save(path)
    return [str(path), synthetic.make_query(scene, "val", rng).texts[0]]


class Page:
    """What happens on the page. ``gr``: gradio. One thread runs the model, another one paints, so
    that neither works for two visitors at once."""

    def __init__(self, gr: Any, visitors: Visitors):
        self.gr, self.visitors = gr, visitors
        self.line, self.folder = visitors.line, visitors.folder
        self._model, self._painter = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._looking: Counter[str] = Counter()

    def close(self) -> None:
        """Begins nothing that was not begun."""
        for worker in (self._model, self._painter):
            worker.shutdown(wait=False, cancel_futures=True)

    async def open(self, visitor: Visitor, path: str | None) -> AsyncIterator[tuple]:
        """A new picture: (messages, choice of answers, *what ``choose`` gives), after words about
        those who come first."""
        self.visitors.forget(visitor.key)
        conversation, picture = None, None
        if path is not None:
            try:
                with self.line.join(visitor) as place:
                    self.visitors.require_place(visitor)
                    picture = self.visitors.receive(path)
                    async for before in place.wait():
                        words = escape(f"Your picture waits; {_count(before)} first.")
                        yield [], *[self.gr.skip()] * 2, words, *[self.gr.skip()] * 3
                    conversation = await self._run(self.visitors.open, visitor, picture)
            except MISTAKES as error:
                self.gr.Warning(self._words(error, picture))
            finally:
                if conversation is None and picture is not None:
                    shutil.rmtree(picture.parent, ignore_errors=True)
        values = visitor, None, ANSWER, 0, True
        shown = await self._run(self._painted, *values, on=self._painter)
        yield [], self._choices(conversation), *shown

    async def ask(
        self, visitor: Visitor, question: Any, view: Any, opacity: Any
    ) -> AsyncIterator[tuple]:
        """The answer as it is generated: (question, messages, choice of answers, *what ``choose``
        gives)."""
        conversation, keep = self.visitors.find(visitor.key), [self.gr.skip()] * 6
        # The page checks all this, too, but a request can be sent without it.
        if not isinstance(question, str):
            raise self._error("A question is a text.")
        if len(question) > QUESTION_LENGTH:
            raise self._error(f"The question is longer than {QUESTION_LENGTH} characters.")
        waits = self.line.holds(visitor.key)
        if conversation is None and not waits:
            raise self._error(self._no_picture(visitor))
        if waits and conversation is not None and conversation.asking is not None:
            raise self._error(ON_ITS_WAY)
        try:
            with self.line.join(visitor) as place:
                place.question = question
                if conversation is not None:
                    conversation.asking = place
                async for before in place.wait():
                    waiting = _messages(question, f"({_count(before)} first)")
                    yield "", [*_turns(conversation), *waiting], *keep
                asked, conversation = conversation, self.visitors.find(visitor.key)
                if asked is not None and asked is not conversation:
                    return  # Another picture came; the page shows that one.
                if conversation is None:  # The picture that was waited for was none.
                    raise self._error(self._no_picture(visitor))
                if asked is not None and asked.asking is not place:
                    return  # It was stopped.
                if len(conversation.answers) >= MOST_ANSWERS:
                    raise self._error(
                        f"This conversation has {MOST_ANSWERS} answers; take some back, or begin"
                        " anew with the bin above it."
                    )
                conversation.asking = place
                stream = await self._run(self.visitors.stream, conversation, question)
                try:
                    text = ""
                    while (piece := await self._run(next, stream, None)) is not None:
                        there = self.visitors.find(visitor.key) is conversation
                        if not there or conversation.asking is not place:
                            return
                        text += piece
                        yield "", [*_turns(conversation), *_messages(question, text)], *keep
                    await self._run(lambda: self.visitors.keep(conversation, stream.result))
                    conversation.asking = None
                except BaseException as error:
                    # A failure is said once. What is cut off may be a stop, which takes it back.
                    if isinstance(error, Exception):
                        conversation.asking = None
                    raise
                finally:
                    # Behind a step that may still run, and before anybody's next one.
                    with contextlib.suppress(RuntimeError):  # The page ends.
                        self._model.submit(stream.close)
        except MISTAKES as error:
            picture = None if conversation is None else conversation.picture
            raise self._error(self._words(error, picture)) from None
        yield await self._whole(visitor, conversation, "", view, opacity)

    async def stop(self, visitor: Visitor, view: Any, opacity: Any) -> tuple:
        """After an answer was stopped: its question back in its box, and the conversation without
        it; else as ``ask``."""
        conversation = self.visitors.find(visitor.key)
        if conversation is None or conversation.asking is None:
            return (self.gr.skip(),) * 8
        question, conversation.asking = conversation.asking.question, None
        return await self._whole(visitor, conversation, question, view, opacity)

    async def undo(self, visitor: Visitor, view: Any, opacity: Any) -> tuple:
        """The last question back in its box; else as ``ask``."""
        conversation = self._at_rest(visitor)
        question = None if conversation is None else conversation.undo()
        if conversation is None or question is None:
            return (self.gr.skip(),) * 8
        return await self._whole(visitor, conversation, question, view, opacity)

    async def reset(self, visitor: Visitor) -> tuple:
        """The conversation forgotten, the picture kept; else as ``ask``."""
        conversation = self._at_rest(visitor)
        if conversation is None:
            return (self.gr.skip(),) * 8
        conversation.reset()
        return await self._whole(visitor, conversation, self.gr.skip(), ANSWER, 0)

    async def view(self, visitor: Visitor, chosen: Any, view: Any, opacity: Any) -> tuple:
        """(picture, legend, steps of the chain) of one answer; ``opacity`` in percent."""
        return await self._look(visitor, chosen, view, opacity)

    async def choose(self, visitor: Visitor, chosen: Any, view: Any, opacity: Any) -> tuple:
        """What ``view`` gives of an answer, and the two buttons to download its files, which work
        if it has a mask."""
        return await self._look(visitor, chosen, view, opacity, True)

    async def _look(self, visitor: Visitor, *values: Any) -> tuple:
        if self._looking[visitor.key] >= MOST_LOOKS:
            raise self._error("Too many views wait to be painted; wait a moment.")
        self._looking[visitor.key] += 1
        try:
            return await self._run(self._painted, visitor, *values, on=self._painter)
        finally:
            self._looking[visitor.key] -= 1
            self._looking += Counter()  # keeps those above zero

    def _painted(
        self, visitor: Visitor, chosen: Any, view: Any, opacity: Any, buttons: bool = False
    ) -> tuple:
        conversation = self.visitors.find(visitor.key)
        shown: tuple = (None, "", "")
        paths: tuple[str | None, str | None] = (None, None)
        number = chosen if isinstance(chosen, int) else None
        alpha, view = _share(opacity), view if isinstance(view, str) else ANSWER
        try:
            if conversation is not None:
                image, answer = conversation.image(), conversation.answer(number)
                side = shown_side(image)
                if answer is None:
                    shown = self._write_picture(conversation, fit(image, side)), "", ""
                else:
                    result = answer.result(image)
                    painted = self._write_picture(conversation, paint(result, view, alpha, side))
                    shown = painted, legend(result), steps(result, alpha)
                    if buttons and result.masks:
                        paths = self._write_downloads(conversation, result)
        except MISTAKES as error:
            self.gr.Warning(self._words(error, conversation.picture if conversation else None))
        if not buttons:
            return shown
        return *shown, *(
            self.gr.DownloadButton(value=path, interactive=path is not None) for path in paths
        )

    def _write_downloads(self, conversation: VisitorChat, result: Result) -> tuple[str, str]:
        for old in conversation.folder.glob(f"{DOWNLOADS}*"):
            shutil.rmtree(old, ignore_errors=True)
        self.folder.require(result.image.nbytes)  # The overlay is a PNG of about this size.
        return write_downloads(result, conversation.folder)

    def _write_picture(self, conversation: VisitorChat, shown: np.ndarray) -> str:
        """A file with uint8 (h, w, 3) RGB. gradio could take the array, but would never delete the
        file that it makes of it."""
        self.folder.require(0)
        number, path = tempfile.mkstemp(suffix=".webp", dir=conversation.folder)
        with os.fdopen(number, "wb") as file:
            Image.fromarray(shown).save(file, format="WEBP", quality=90)
        conversation.show(Path(path))
        return path

    async def _whole(
        self, visitor: Visitor, conversation: VisitorChat, question: Any, view: Any, opacity: Any
    ) -> tuple:
        """Everything that ``ask`` gives, with the last answer chosen."""
        values = visitor, len(conversation.answers) - 1, view, opacity, True
        shown = await self._run(self._painted, *values, on=self._painter)
        return question, _turns(conversation), self._choices(conversation), *shown

    def _choices(self, conversation: VisitorChat | None) -> Any:
        answers = conversation.answers if conversation else []
        names = [(f"{i}. {kept.shell.question}", i - 1) for i, kept in enumerate(answers, start=1)]
        last = len(names) - 1 if names else None
        return self.gr.Dropdown(choices=names, value=last, interactive=len(names) > 1)

    def _at_rest(self, visitor: Visitor) -> VisitorChat | None:
        """The conversation, if nothing of it waits for the model."""
        if self.line.holds(visitor.key):
            raise self._error(ON_ITS_WAY)
        return self.visitors.find(visitor.key)

    def _no_picture(self, visitor: Visitor) -> str:
        if why := self.visitors.why_forgotten(visitor.key):
            return f"This conversation was forgotten: {why}. Drop the picture again to go on."
        return "First drop a picture, or choose one of the examples."

    def _words(self, error: BaseException, path: Path | None = None) -> str:
        """What a visitor is told about an error."""
        if not isinstance(error, (ValueError, OSError)):  # Memory, which others hold.
            self.visitors.rest_all()
            return "There is too little memory for this now; try again, or with a smaller picture."
        return _public(error, str(path or ""))

    def _error(self, words: str) -> Exception:
        return self.gr.Error(words, print_exception=False)

    async def _run(self, call: Callable, *values: Any, on: ThreadPoolExecutor | None = None) -> Any:
        """``call`` in the thread of the model, or another one. If whoever waits for it is stopped,
        it still comes to its end before the next one begins."""
        loop = asyncio.get_running_loop()
        inside = functools.partial(contextvars.copy_context().run, call, *values)
        return await loop.run_in_executor(on or self._model, inside)

    def build(self, examples: list[list[str]]) -> Any:
        """The page as gradio's Blocks."""
        gr = self.gr
        levels = self.visitors.segmenter.processor.levels
        views = [ANSWER, CHAIN, *levels[:-1], PICTURE]
        with gr.Blocks(
            title="Ask a picture",
            analytics_enabled=False,
            delete_cache=(FORGET_AFTER, FORGET_AFTER),
        ) as page:
            gr.Markdown(f"# Ask a picture\n{INTRODUCTION}")
            with gr.Row():
                with gr.Column(scale=5, elem_id="asking"):
                    sent = gr.Image(
                        label="Picture",
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        height=260,
                        buttons=[],
                        elem_id="upload",
                    )
                    # gradio would decode the file first, with neither our limits on its size nor
                    # our messages about what is wrong with it.
                    sent.preprocess = lambda file: None if file is None else file.path
                    messages = gr.Chatbot(
                        label="Conversation",
                        height=300,
                        render_markdown=False,
                        latex_delimiters=[],
                        buttons=[],
                        elem_id="conversation",
                        placeholder="Ask where something is, or what it is for.",
                        feedback_options=None,
                        allow_tags=False,
                    )
                    question = gr.Textbox(
                        label="Question",
                        placeholder="Which part lets the dog smell?",
                        max_length=QUESTION_LENGTH,
                        lines=1,
                        max_lines=4,
                        elem_id="question",
                    )
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        stop = gr.Button("Stop", elem_id="stop")
                        undo = gr.Button("Take back", elem_id="undo")
                    if examples:
                        gr.Examples(
                            examples, [sent, question], label="Examples", elem_id="examples"
                        )
                with gr.Column(scale=6, elem_id="answering"):
                    result = gr.Image(
                        label="Answer",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        height=400,
                        elem_id="result",
                    )
                    # The steps stand beside the answer, above the fold of a small screen.
                    chain = gr.HTML(elem_id="chain")
                    colours = gr.HTML(elem_id="legend")
                    with gr.Row():
                        view = gr.Radio(views, value=ANSWER, label="Show", elem_id="view", scale=3)
                        opacity = gr.Slider(
                            maximum=100,
                            value=OPACITY,
                            step=5,
                            label="Opacity in percent",
                            elem_id="opacity",
                            scale=2,
                        )
                    chosen = gr.Dropdown([], label="Answer to", interactive=False, elem_id="chosen")
                    with gr.Row():
                        masks = gr.DownloadButton("Masks (PNG)", interactive=False, elem_id="masks")
                        coco = gr.DownloadButton("COCO JSON", interactive=False, elem_id="coco")
            shown = [result, colours, chain]
            answer = [*shown, masks, coco]
            everything = [question, messages, chosen, *answer]
            # gradio would look up what was sent among what it last showed, which it may have
            # forgotten, and says nothing to a visitor about what it does not know.
            for sender in (question, view, opacity, chosen):
                sender.preprocess = lambda value: value
            # Line keeps the order for the model, so that limits and places can be told.
            model = {"concurrency_limit": None, "api_visibility": "private"}
            light = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
            page.preprocess_data = _in_words(gr, page.preprocess_data)
            of = functools.partial(_of_visitor, gr)
            sent.change(of(self.open), [sent], [messages, chosen, *answer], **model)
            answering = gr.on(
                [ask.click, question.submit],
                of(self.ask),
                [question, view, opacity],
                everything,
                show_progress_on=[messages],
                **model,
            )
            stop.click(of(self.stop), [view, opacity], everything, cancels=[answering], **light)
            messages.clear(of(self.reset), None, everything, **model)
            undo.click(of(self.undo), [view, opacity], everything, **model)
            page.unload(lambda: None)  # Without it, a page would not tell that it is still open.
            look = [chosen, view, opacity]
            gr.on([view.change, opacity.release], of(self.view), look, shown, **light)
            chosen.input(of(self.choose), look, answer, **light)
        return page


def _of_visitor(gr: Any, handler: Callable) -> Callable:
    """A handler as gradio calls it, which passes its own Request for an argument so annotated."""

    def visitor(request: Any) -> Visitor:
        client = request.client
        return Visitor(str(request.session_hash), client.host if client else "")

    async def stream(request: Any, *values: Any) -> AsyncIterator:
        async with contextlib.aclosing(handler(visitor(request), *values)) as given:
            async for shown in given:
                yield shown

    async def answer(request: Any, *values: Any) -> Any:
        return await handler(visitor(request), *values)

    handle: Callable = stream if inspect.isasyncgenfunction(handler) else answer
    handle.__annotations__["request"] = gr.Request
    handle.__name__ = handler.__name__
    return handle


def _in_words(gr: Any, read: Callable) -> Callable:
    """``read``, gradio's own check of what was sent, with words for a visitor in place of a trace
    in the server's log. Only a request that no page sends fails there."""

    async def checked(function: Any, sent: list, *args: Any, **kwargs: Any) -> Any:
        # gradio would fetch a picture from an address that is named as its path, or beside it.
        own = [{**value, "url": None} if isinstance(value, dict) else value for value in sent]
        try:
            if any("://" in str(value.get("path")) for value in own if isinstance(value, dict)):
                raise ValueError("a picture must have been sent to this page")
            return await read(function, own, *args, **kwargs)
        except Exception:
            raise gr.Error("This is no request of the page.", print_exception=False) from None

    return checked


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    """One turn of the conversation, escaped: gradio takes messages for HTML."""
    return [
        {"role": "user", "content": escape(question)},
        {"role": "assistant", "content": escape(answer)},
    ]


def _turns(conversation: VisitorChat | None) -> list[dict[str, str]]:
    """As gradio's Chatbot takes them."""
    return [
        message
        for kept in (conversation.answers if conversation else [])
        for message in _messages(kept.shell.question, _answer_text(kept.shell))
    ]


def _count(before: int) -> str:
    return "1 other comes" if before == 1 else f"{before} others come"


def _share(percent: Any) -> float:
    """In [0, 1]; what is no percentage counts as the page's first value."""
    sound = isinstance(percent, (int, float)) and 0 <= percent <= 100
    return (percent if sound else OPACITY) / 100


def _answer_text(result: Result) -> str:
    """The text of an answer and, below it, the remarks about it."""
    return "\n".join([*filter(None, [result.text]), *(f"({remark})" for remark in remarks(result))])


def _public(error: Exception, path: str = "") -> str:
    """The message of an error about the file ``path`` without the folder that this machine keeps it
    in."""
    message = one_line(error)
    if isinstance(error, OSError) and error.strerror:  # The system's, which names any file.
        message = error.strerror
    return message.replace(str(Path(path).parent) + os.sep, "") if path else message


def serve(args: Namespace, folder: ServedFolder, block: bool = True) -> Any:
    """Starts the page; returns gradio's Blocks, whose ``local_url`` is its address, and whose
    ``visitors`` is the store of their conversations. ``block``: does not return before the page is
    ended by a signal.

    Nothing of this machine's disk can be read through it but what it keeps in ``folder``: pictures
    that were sent, examples, and files to download. Raises UsageError for a missing gradio or a
    port in use.
    """
    gr = import_gradio(folder.path)
    from starlette.middleware import Middleware  # gradio brings it.

    limit_pixels(args.max_megapixels)
    examples = read_examples(args.examples, folder.path)
    limits = args.max_conversations, args.keep_ready
    visitors = Visitors(load_segmenter(args), folder, Line(args.max_queue), *limits)
    handlers = Page(gr, visitors)
    page = handlers.build(examples)
    page.visitors = visitors
    page.queue(max_size=args.max_queue, default_concurrency_limit=4, api_open=False)
    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    upload = args.max_upload_mb * 2**20
    guard = Middleware(
        Guard,
        visitors=visitors,
        folder=folder,
        most_upload=upload,
        host=args.host,
        names=args.allowed_hosts,
    )
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port or None,
            share=False,
            show_error=False,
            quiet=True,
            inbrowser=False,
            max_file_size=upload,
            # Every question that waits is a running job to gradio.
            max_threads=args.max_queue + GRADIO_JOBS,
            allowed_paths=[],
            state_session_capacity=GRADIO_SESSIONS,
            app_kwargs={
                "middleware": [guard],
                "openapi_url": None,
                "docs_url": None,
                "redoc_url": None,
            },
            footer_links=[],
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            prevent_thread_lock=True,
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise UsageError(
            f"--host {args.host} --port {args.port}: cannot listen there ({error}); choose another"
            " port"
        ) from None
    folder.keep_all()
    print(f"open {page.local_url}", flush=True)
    if args.host not in LOCAL_HOSTS:
        print(
            f"warning: --host {args.host} lets every machine that can reach this one ask the model",
            file=sys.stderr,
        )
    if block:
        gone: set[str] = set()
        try:
            while True:
                threading.Event().wait(SWEEP_EVERY)
                visitors.sweep()
                gone = drop_gone(page, gone)
        finally:
            page.close(verbose=False)
            handlers.close()
    return page


def drop_gone(page: Any, before: set[str]) -> set[str]:
    """Frees what gradio keeps of visitors who are gone: it would keep some of it for an hour, and
    some for ever. ``before``: who was gone the last time, which this returned; an answer may be on
    its way to others."""
    states, queue = page.state_holder, page._queue
    kept = [states.session_data, states.time_last_used]
    kept += [queue.pending_messages_per_session, queue.pending_event_ids_session]
    keys = set().union(*(list(table) for table in kept))
    gone = {key for key in keys if not page.visitors.knows(key)}
    for table in kept:
        for key in gone & before:
            table.pop(key, None)
    return gone


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (docker stop, systemd, a closed terminal) end what runs inside as the end
    of the program does, so that files are removed."""

    def end(*_: Any) -> NoReturn:
        raise SystemExit(0)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {(n := getattr(signal, name)): signal.signal(n, end) for name in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command.entry(memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    distributed.prepare_environment()
    args = read_page(argv)
    with ended_by_signals(), ServedFolder(args.max_disk_mb * 2**20) as folder:
        serve(args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
