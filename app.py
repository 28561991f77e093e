"""A web page around a model: drop a picture, ask, see how the answer was found.

    python app.py --version runs/demo/model            # then open the address it prints

The page is for this machine alone unless --host says otherwise. docs/app.md has more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chat import add_model_flags, load, remarks
from dataset.drawing import fit, level_colour, overlay
from dataset.files.errors import DataError
from dataset.files.images import read_image
from dataset.files.text import read_json
from dataset.synthetic import write as synthetic
from model.inference.results import Result
from model.inference.segmenter import ReasoningSegmenter, Session
from utils import distributed
from utils.report.gallery import jpeg
from utils.report.html import Markup, join, picture, tag
from utils.settings.arguments import OneLineParser, one_line
from utils.settings.flags import UsageError

LOCAL = ("127.0.0.1", "localhost", "::1")
ANSWER, CHAIN, PICTURE = "answer", "whole chain", "picture only"
# pixels of the longer side as shown: a small picture is enlarged so that outlines stay thin
SIDES = (640, 1280)
TILE = 320
QUESTION_LENGTH = 1000  # characters
FORGET_AFTER = 3600  # seconds without use, for a conversation and its files
MOST_PEOPLE = 16  # conversations that are kept, with the model's memory of their pictures
CSS = """
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; min-height: 22px; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.chain { display: flex; gap: 10px; }
.chain figure { margin: 0; flex: 1 1 0; min-width: 0; max-width: 33%; }
.chain img { width: 100%; border-radius: 6px; margin: 0; }
.chain figcaption { font-size: 13px; margin-top: 4px; }
"""
INTRODUCTION = (
    "Drop a picture, ask about it, and see where the answer is. The model first marks **where to"
    " look**, then **what was meant**. A further question may refer to the ones before."
)


def read_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument(
        "--examples",
        type=Path,
        help='JSON list of {"image": path, "question": text} (default: three drawn scenes)',
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: every machine that can reach this one",
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any free one")
    parser.add_argument(
        "--max_upload_mb", type=int, default=20, help="largest picture that may be sent"
    )
    parser.add_argument(
        "--max_queue",
        type=int,
        default=16,
        help="questions that may wait; further ones are refused",
    )
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "model_max_length", "max_upload_mb", "max_queue"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port is {args.port}; it must be from 0 to 65535")
    return args


def import_gradio(cache: Path) -> Any:
    """The library, which keeps its files in ``cache`` and tells nobody that it runs. Raises
    UsageError without it."""
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise UsageError(
            "the page needs the package gradio: pip install 'gradio>=6.31' (see"
            " requirements-optional.txt)"
        ) from None
    return gradio


# ------------------------------------------------------------------------------------------ drawing


def shown_side(image: np.ndarray) -> int:
    return int(np.clip(max(image.shape[:2]), *SIDES))


def levels_of(result: Result) -> list[str]:
    return list(result.masks[0].levels) if result.masks else []


def paint(result: Result, view: str, alpha: float, side: int) -> np.ndarray:
    """uint8 RGB with a longer side of ``side``: the picture under the masks of ``view``, which is
    ANSWER, CHAIN, PICTURE or the name of a level; ``alpha`` in [0, 1]."""
    out, names = fit(result.image, side), levels_of(result)
    wanted = {CHAIN: names, ANSWER: names[-1:], PICTURE: []}.get(view, [view])
    for found in result.masks:
        for level, (name, mask) in enumerate(found.levels.items()):
            if name in wanted and mask.any():
                out = overlay(out, fit(mask, side), level_colour(level, len(names)), alpha)
    return out


def steps(result: Result, alpha: float) -> Markup:
    """The chain, coarse to fine: the picture and one tile for every level."""
    names = levels_of(result)
    if not names:
        return Markup()
    captions = [
        f"{i + 1}. [{name}] {'the answer' if i == len(names) - 1 else 'where to look'}"
        for i, name in enumerate(names)
    ]
    shown = [(PICTURE, "the picture"), *zip(names, captions, strict=True)]
    tiles = [
        (picture(jpeg(paint(result, view, alpha, TILE)), caption), caption)
        for view, caption in shown
    ]
    return tag(
        "div",
        *(tag("figure", tile, tag("figcaption", caption)) for tile, caption in tiles),
        class_="chain",
    )


def legend(result: Result | None) -> Markup:
    """What the colours stand for, and what the model thinks of its masks."""
    if result is None:
        return Markup()
    if not result.masks:
        return tag("div", tag("span", "This answer has no mask."), class_="legend")
    entries = []
    for number, found in enumerate(result.masks):
        for level, (name, mask) in enumerate(found.levels.items()):
            red, green, blue = level_colour(level, len(found.levels))
            which = f" {number + 1}" if len(result.masks) > 1 else ""
            facts = (
                f"[{name}]{which}: {100 * mask.mean():.1f} % of the picture, predicted IoU"
                f" {found.ious[name]:.2f}"
            )
            entries.append(
                tag("span", tag("i", style=f"background: rgb({red}, {green}, {blue})"), facts)
            )
    return tag("div", join(entries), class_="legend")


def save(result: Result, folder: Path) -> tuple[str, str]:
    """Writes masks.zip, the PNG of every mask of every level and the overlay, and coco.json;
    returns their paths."""
    target = Path(tempfile.mkdtemp(dir=folder))
    files = result.save(target / "files")
    with zipfile.ZipFile(target / "masks.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((target / "files").iterdir()):
            archive.write(path, path.name)
    shutil.rmtree(target / "files")
    (target / "coco.json").write_text(
        json.dumps(result.to_coco() | {"answer": result.text}), encoding="utf-8"
    )
    assert files["masks"], "only answers with a mask are saved"
    return str(target / "masks.zip"), str(target / "coco.json")


# ----------------------------------------------------------------------------------------- examples


def read_examples(path: Path | None, folder: Path) -> list[list[str]]:
    """[path, question] pairs: those of a JSON, or scenes drawn into ``folder``. Raises DataError
    naming file and entry."""
    if path is None:
        return [_drawn(number, folder) for number in range(3)]
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


def _drawn(number: int, folder: Path) -> list[str]:
    rng = synthetic.scene_rng(0, "val", number)
    scene = synthetic.make_scene(rng)
    path = folder / f"example-{number + 1}.png"
    Image.fromarray(scene.image).save(path)
    return [str(path), synthetic.make_query(scene, "val", rng).texts[0]]


# --------------------------------------------------------------------------------------------- page


@dataclass
class Talk:
    """One person's conversation about one picture."""

    session: Session
    results: list[Result] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            message
            for result in self.results
            for message in _turn(result.question, _answer(result))
        ]


class Page:
    """What happens on the page. ``gr``: gradio; ``folder``: for files to download."""

    def __init__(self, gr: Any, segmenter: ReasoningSegmenter, folder: Path):
        self.gr, self.segmenter, self.folder = gr, segmenter, folder

    def open(self, path: str | None) -> tuple:
        """A new picture: (talk, messages, choice of answers, *what ``view`` gives)."""
        if path is None:
            return None, [], self._choices(None), *self._nothing()
        try:
            talk = Talk(self.segmenter.open(path))
        except (ValueError, OSError) as error:
            self.gr.Warning(_public(error, path))
            return None, [], self._choices(None), *self._nothing()
        side = shown_side(talk.session.image)
        return (
            talk,
            [],
            self._choices(talk),
            self._file_of(fit(talk.session.image, side)),
            *self._nothing()[1:],
        )

    def ask(self, talk: Talk | None, question: str, view: str, opacity: float) -> Iterator[tuple]:
        """The answer as it comes: (talk, question, messages, choice of answers, *what ``view``
        gives)."""
        skip = self.gr.skip()
        if talk is None:
            raise self.gr.Error(
                "First drop a picture, or choose one of the examples.", print_exception=False
            )
        # the box alone cannot refuse what did not come through it
        if len(question) > QUESTION_LENGTH:
            raise self.gr.Error(
                f"The question is longer than {QUESTION_LENGTH} characters.", print_exception=False
            )
        stream, said = talk.session.stream(question), ""
        try:
            for piece in stream:
                said += piece
                yield talk, "", [*talk.messages, *_turn(question, said)], *[skip] * 6
            talk.results.append(stream.result)
        except ValueError as error:
            raise self.gr.Error(_public(error), print_exception=False) from None
        finally:
            stream.close()
        chosen = len(talk.results) - 1
        yield (
            talk,
            "",
            talk.messages,
            self._choices(talk),
            *self.view(talk, chosen, view, opacity),
            *self._files(talk, chosen),
        )

    def undo(self, talk: Talk | None, view: str, opacity: float) -> tuple:
        """The last question back in its box; else as ``ask``."""
        question = None if talk is None else talk.session.undo()
        if question is None:
            return talk, *[self.gr.skip()] * 8
        while talk.results and talk.results[-1].question != question:
            talk.results.pop()  # an answer without words is no turn of the conversation
        talk.results = talk.results[:-1]
        chosen = len(talk.results) - 1
        shown = (*self.view(talk, chosen, view, opacity), *self._files(talk, chosen))
        return talk, question, talk.messages, self._choices(talk), *shown

    def reset(self, talk: Talk | None) -> tuple:
        """The conversation forgotten, the picture kept; else as ``ask``."""
        if talk is None:
            return talk, *[self.gr.skip()] * 8
        talk.session.reset()
        talk.results = []
        return (
            talk,
            self.gr.skip(),
            [],
            self._choices(talk),
            *self.view(talk, None, ANSWER, 0),
            *self._files(talk, None),
        )

    def view(self, talk: Talk | None, chosen: int | None, view: str, opacity: float) -> tuple:
        """(picture, legend, steps of the chain) of one answer; ``opacity`` in percent."""
        if talk is None:
            return self._nothing()[:3]
        if not talk.results or chosen is None or not 0 <= chosen < len(talk.results):
            return (
                self._file_of(fit(talk.session.image, shown_side(talk.session.image))),
                legend(None),
                Markup(),
            )
        result, alpha = talk.results[chosen], opacity / 100
        return (
            self._file_of(paint(result, view, alpha, shown_side(result.image))),
            legend(result),
            steps(result, alpha),
        )

    def choose(self, talk: Talk | None, chosen: int | None, view: str, opacity: float) -> tuple:
        """Another answer of the conversation: what ``view`` gives, and its files."""
        return *self.view(talk, chosen, view, opacity), *self._files(talk, chosen)

    def _file_of(self, shown: np.ndarray) -> str:
        """A file with uint8 (h, w, 3) RGB. gradio deletes the files that it is given; those it
        makes of arrays, it forgets."""
        number, path = tempfile.mkstemp(suffix=".webp", dir=self.folder)
        with os.fdopen(number, "wb") as file:
            Image.fromarray(shown).save(file, format="WEBP", quality=90)
        return path

    def _nothing(self) -> tuple:
        return None, legend(None), Markup(), *self._files(None, None)

    def _files(self, talk: Talk | None, chosen: int | None) -> tuple:
        """The two buttons, which work if the answer has a mask."""
        ready = (
            talk is not None
            and chosen is not None
            and 0 <= chosen < len(talk.results)
            and talk.results[chosen].masks
        )
        paths = save(talk.results[chosen], self.folder) if ready else (None, None)
        return tuple(self.gr.DownloadButton(value=path, interactive=bool(ready)) for path in paths)

    def _choices(self, talk: Talk | None) -> Any:
        names = [
            (f"{i + 1}. {result.question}", i)
            for i, result in enumerate(talk.results if talk else [])
        ]
        return self.gr.Dropdown(
            choices=names, value=len(names) - 1 if names else None, interactive=len(names) > 1
        )

    def build(self, examples: list[list[str]]) -> Any:
        """The page as gradio's Blocks."""
        gr = self.gr
        views = [ANSWER, CHAIN, *self.segmenter.processor.levels[:-1], PICTURE]
        with gr.Blocks(
            title="Ask a picture",
            analytics_enabled=False,
            delete_cache=(FORGET_AFTER, FORGET_AFTER),
        ) as page:
            talk = gr.State(None, time_to_live=FORGET_AFTER)
            gr.Markdown(f"# Ask a picture\n{INTRODUCTION}")
            with gr.Row():
                with gr.Column(scale=5):
                    sent = gr.Image(
                        label="Picture",
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        height=260,
                        buttons=[],
                        elem_id="upload",
                    )
                    # gradio would decode the file itself first, without our limits and our words
                    # for what is wrong with it
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
                            examples, inputs=[sent, question], label="Examples", elem_id="examples"
                        )
                with gr.Column(scale=6):
                    result = gr.Image(
                        label="Answer",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        height=480,
                        elem_id="result",
                    )
                    colours = gr.HTML(elem_id="legend")
                    with gr.Row():
                        view = gr.Radio(views, value=ANSWER, label="Show", elem_id="view", scale=3)
                        opacity = gr.Slider(
                            0,
                            100,
                            value=45,
                            step=5,
                            label="Opacity in percent",
                            elem_id="opacity",
                            scale=2,
                        )
                    chosen = gr.Dropdown([], label="Answer to", interactive=False, elem_id="chosen")
                    chain = gr.HTML(elem_id="chain")
                    with gr.Row():
                        masks = gr.DownloadButton("Masks (PNG)", interactive=False, elem_id="masks")
                        coco = gr.DownloadButton("COCO JSON", interactive=False, elem_id="coco")
            shown = [result, colours, chain]
            everything = [talk, question, messages, chosen, *shown, masks, coco]
            # the model answers one question at a time; a drag of the slider need not wait for it
            model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
            light = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
            sent.change(self.open, [sent], [talk, messages, chosen, *shown, masks, coco], **model)
            inputs = [talk, question, view, opacity]
            answering = gr.on(
                [ask.click, question.submit],
                self.ask,
                inputs,
                everything,
                show_progress_on=[messages],
                **model,
            )
            stop.click(None, cancels=[answering], api_visibility="private")
            messages.clear(self.reset, [talk], everything, **model)
            undo.click(self.undo, [talk, view, opacity], everything, **model)
            gr.on(
                [view.change, opacity.release],
                self.view,
                [talk, chosen, view, opacity],
                shown,
                **light,
            )
            chosen.input(self.choose, [talk, chosen, view, opacity], [*shown, masks, coco], **light)
        return page


def _turn(question: str, said: str) -> list[dict[str, str]]:
    """Two messages of the conversation, escaped: gradio takes them for HTML."""
    return [
        {"role": "user", "content": escape(question)},
        {"role": "assistant", "content": escape(said)},
    ]


def _answer(result: Result) -> str:
    """The words of an answer, and below them what is to be said about it."""
    return "\n".join([*filter(None, [result.text]), *(f"({remark})" for remark in remarks(result))])


def _public(error: Exception, path: str = "") -> str:
    """One line that does not tell where files of this machine lie."""
    message = one_line(error)
    return message.replace(str(Path(path).parent) + os.sep, "") if path else message


# -------------------------------------------------------------------------------------------- start


def serve(args: Namespace, folder: Path, block: bool = True) -> Any:
    """Starts the page with its files in ``folder``; returns gradio's Blocks, and its address as
    ``local_url``.

    Nothing of this machine's disk can be read through it but what it keeps in ``folder``: pictures
    that were sent, examples, and files to download. Raises UsageError for a missing gradio or a
    port in use.
    """
    gr = import_gradio(folder)
    examples = read_examples(args.examples, folder)
    page = Page(gr, load(args), folder).build(examples)
    page.queue(max_size=args.max_queue, default_concurrency_limit=4, api_open=False)
    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port or None,
            share=False,
            show_error=False,
            quiet=True,
            inbrowser=False,
            max_file_size=args.max_upload_mb * 2**20,
            allowed_paths=[],
            state_session_capacity=MOST_PEOPLE,
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
    print(f"open {page.local_url}", flush=True)
    if args.host not in LOCAL:
        print(
            f"warning: --host {args.host} lets every machine that can reach this one ask the model",
            file=sys.stderr,
        )
    if block:
        page.block_thread()
    return page


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    distributed.prepare_environment()
    try:
        args = read_arguments(argv)
        with tempfile.TemporaryDirectory(prefix="cores-app-") as folder:
            serve(args, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
