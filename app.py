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

from dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np
from PIL import Image

from chat import LESS_MEMORY, add_model_flags, load_segmenter, remarks, require_positive
from dataset.command import one_line
from dataset.drawing import fit, level_colour, overlay
from dataset.files.errors import DataError
from dataset.files.images import read_image
from dataset.files.text import read_json
from dataset.synthetic import write as synthetic
from model.inference.results import Result
from model.inference.segmenter import ReasoningSegmenter, Session
from utils import distributed
from utils.report.gallery import encode_jpeg
from utils.report.html import TEMPLATES
from utils.settings.arguments import OneLineParser
from utils.settings.flags import UsageError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ANSWER, CHAIN, PICTURE = "answer", "whole chain", "picture only"  # views, beside those of a level
# Pixels of the longer side as shown: a small picture is enlarged, so that outlines stay thin.
SIDES = (640, 1280)
TILE = 320
QUESTION_LENGTH = 1000  # characters
FORGET_AFTER = 3600  # seconds without use, for a conversation and its files
MOST_VISITORS = 16  # conversations that are kept, each with the KV cache of its picture
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
"""
INTRODUCTION = (
    "Drop a picture, ask about it, and see where the answer is. The model first marks **where to"
    " look**, then **what was meant**. A further question may refer to the ones before."
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
<span>This answer has no mask.</span>
{% endfor %}
</div>""")


def read_page_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_model_flags(parser)
    add = parser.add_argument
    examples = 'JSON list of {"image": path, "question": text} (default: three drawn scenes)'
    add("--examples", type=Path, help=examples)
    host = "address to listen on; 0.0.0.0: every machine that can reach this one"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=7860, help="0: any free one")
    add("--max_upload_mb", type=int, default=20, help="largest picture that may be sent")
    queue = "questions that may wait; further ones are refused"
    add("--max_queue", type=int, default=16, help=queue)
    args = parser.parse_args(argv)
    require_positive(args, "max_new_tokens", "model_max_length", "max_upload_mb", "max_queue")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port is {args.port}; it must be from 0 to 65535")
    return args


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
            "the page needs the package gradio: pip install 'gradio>=6.31' (see"
            " requirements-optional.txt)"
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
            text = f"[{name}]{which}: {area}, predicted IoU {iou}"
            entries.append((level_colour(level, len(found.levels)), text))
    return LEGEND.render(entries=entries)


def write_downloads(result: Result, folder: Path) -> tuple[str, str]:
    """Writes masks.zip, the PNG of every mask of every level and the overlay, and coco.json into a
    new folder inside ``folder``; returns their paths. The answer must have a mask."""
    assert result.masks, "only an answer with a mask can be downloaded"
    target = Path(tempfile.mkdtemp(dir=folder))
    result.save(target / "files")
    with zipfile.ZipFile(target / "masks.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((target / "files").iterdir()):
            archive.write(path, path.name)
    shutil.rmtree(target / "files")
    coco = json.dumps(result.to_coco() | {"answer": result.text})
    (target / "coco.json").write_text(coco, encoding="utf-8")
    return str(target / "masks.zip"), str(target / "coco.json")


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


@dataclass
class VisitorChat:
    """One visitor's conversation about one picture."""

    session: Session
    results: list[Result] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As gradio's Chatbot takes them."""
        return [
            message
            for result in self.results
            for message in _messages(result.question, _answer_text(result))
        ]

    def result(self, chosen: int | None) -> Result | None:
        """An answer by its index; None where there is no such answer."""
        if chosen is None or not 0 <= chosen < len(self.results):
            return None
        return self.results[chosen]


class Page:
    """What happens on the page. ``gr``: gradio; ``folder``: for files to download."""

    def __init__(self, gr: Any, segmenter: ReasoningSegmenter, folder: Path):
        self.gr, self.segmenter, self.folder = gr, segmenter, folder

    def open(self, path: str | None) -> tuple:
        """A new picture: (chat, messages, choice of answers, *what ``choose`` gives)."""
        chat = None
        if path is not None:
            try:
                chat = VisitorChat(self.segmenter.open(path))
            except (ValueError, OSError) as error:
                self.gr.Warning(_public(error, path))
        return chat, [], self._choices(chat), *self.choose(chat, None, ANSWER, 0)

    def ask(
        self, chat: VisitorChat | None, question: str, view: str, opacity: float
    ) -> Iterator[tuple]:
        """The answer as it is generated: (chat, question, messages, choice of answers, *what
        ``choose`` gives)."""
        if chat is None:
            raise self.gr.Error(
                "First drop a picture, or choose one of the examples.", print_exception=False
            )
        # The text box has a limit, too, but a request can be sent without the box.
        if len(question) > QUESTION_LENGTH:
            raise self.gr.Error(
                f"The question is longer than {QUESTION_LENGTH} characters.", print_exception=False
            )
        stream, text = chat.session.stream(question), ""
        try:
            for piece in stream:
                text += piece
                messages = [*chat.messages, *_messages(question, text)]
                yield chat, "", messages, *[self.gr.skip()] * 6
            chat.results.append(stream.result)
        except ValueError as error:
            raise self.gr.Error(_public(error), print_exception=False) from None
        finally:
            stream.close()
        yield self._whole(chat, "", view, opacity)

    def undo(self, chat: VisitorChat | None, view: str, opacity: float) -> tuple:
        """The last question back in its box; else as ``ask``."""
        question = None if chat is None else chat.session.undo()
        if chat is None or question is None:
            return chat, *[self.gr.skip()] * 8
        # The session remembers no answer without text, so such answers may come after the last one
        # it remembers.
        while chat.results and chat.results.pop().question != question:
            pass
        return self._whole(chat, question, view, opacity)

    def reset(self, chat: VisitorChat | None) -> tuple:
        """The conversation forgotten, the picture kept; else as ``ask``."""
        if chat is None:
            return chat, *[self.gr.skip()] * 8
        chat.session.reset()
        chat.results = []
        return self._whole(chat, self.gr.skip(), ANSWER, 0)

    def _whole(self, chat: VisitorChat, question: Any, view: str, opacity: float) -> tuple:
        """Everything that ``ask`` gives, with the last answer chosen."""
        shown = self.choose(chat, len(chat.results) - 1, view, opacity)
        return chat, question, chat.messages, self._choices(chat), *shown

    def view(
        self, chat: VisitorChat | None, chosen: int | None, view: str, opacity: float
    ) -> tuple[str | None, str, str]:
        """(picture, legend, steps of the chain) of one answer; ``opacity`` in percent."""
        if chat is None:
            return None, "", ""
        image, result = chat.session.image, chat.result(chosen)
        side = shown_side(image)
        if result is None:
            return self._write_picture(fit(image, side)), "", ""
        alpha = opacity / 100
        painted = self._write_picture(paint(result, view, alpha, side))
        return painted, legend(result), steps(result, alpha)

    def choose(
        self, chat: VisitorChat | None, chosen: int | None, view: str, opacity: float
    ) -> tuple:
        """What ``view`` gives of an answer, and the two buttons to download its files, which work
        if it has a mask."""
        result = None if chat is None else chat.result(chosen)
        paths: tuple[str | None, str | None] = (None, None)
        if result is not None and result.masks:
            paths = write_downloads(result, self.folder)
        buttons = [self.gr.DownloadButton(value=p, interactive=p is not None) for p in paths]
        return *self.view(chat, chosen, view, opacity), *buttons

    def _write_picture(self, shown: np.ndarray) -> str:
        """A file with uint8 (h, w, 3) RGB. gradio could take the array, but would never delete the
        file that it makes of it; a file that it is given, it deletes."""
        number, path = tempfile.mkstemp(suffix=".webp", dir=self.folder)
        with os.fdopen(number, "wb") as file:
            Image.fromarray(shown).save(file, format="WEBP", quality=90)
        return path

    def _choices(self, chat: VisitorChat | None) -> Any:
        results = chat.results if chat else []
        names = [(f"{i}. {result.question}", i - 1) for i, result in enumerate(results, start=1)]
        last = len(names) - 1 if names else None
        return self.gr.Dropdown(choices=names, value=last, interactive=len(names) > 1)

    def build(self, examples: list[list[str]]) -> Any:
        """The page as gradio's Blocks."""
        gr = self.gr
        views = [ANSWER, CHAIN, *self.segmenter.processor.levels[:-1], PICTURE]
        with gr.Blocks(
            title="Ask a picture",
            analytics_enabled=False,
            delete_cache=(FORGET_AFTER, FORGET_AFTER),
        ) as page:
            chat = gr.State(None, time_to_live=FORGET_AFTER)
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
                            maximum=100,
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
            answer = [*shown, masks, coco]
            everything = [chat, question, messages, chosen, *answer]
            # The model answers one question at a time, but a drag of the slider need not wait.
            model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
            light = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
            sent.change(self.open, [sent], [chat, messages, chosen, *answer], **model)
            answering = gr.on(
                [ask.click, question.submit],
                self.ask,
                [chat, question, view, opacity],
                everything,
                show_progress_on=[messages],
                **model,
            )
            stop.click(None, cancels=[answering], api_visibility="private")
            messages.clear(self.reset, [chat], everything, **model)
            undo.click(self.undo, [chat, view, opacity], everything, **model)
            look = [chat, chosen, view, opacity]
            gr.on([view.change, opacity.release], self.view, look, shown, **light)
            chosen.input(self.choose, look, answer, **light)
        return page


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    """One turn of the conversation, escaped: gradio takes messages for HTML."""
    return [
        {"role": "user", "content": escape(question)},
        {"role": "assistant", "content": escape(answer)},
    ]


def _answer_text(result: Result) -> str:
    """The text of an answer and, below it, the remarks about it."""
    return "\n".join([*filter(None, [result.text]), *(f"({remark})" for remark in remarks(result))])


def _public(error: Exception, path: str = "") -> str:
    """The message of an error about the file ``path`` without the folder that this machine keeps it
    in."""
    message = one_line(error)
    return message.replace(str(Path(path).parent) + os.sep, "") if path else message


def serve(args: Namespace, folder: Path, block: bool = True) -> Any:
    """Starts the page; returns gradio's Blocks, whose ``local_url`` is its address. ``block``: does
    not return before the page ends.

    Nothing of this machine's disk can be read through it but what it keeps in ``folder``: pictures
    that were sent, examples, and files to download. Raises UsageError for a missing gradio or a
    port in use.
    """
    gr = import_gradio(folder)
    examples = read_examples(args.examples, folder)
    page = Page(gr, load_segmenter(args), folder).build(examples)
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
            state_session_capacity=MOST_VISITORS,
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
    if args.host not in LOCAL_HOSTS:
        print(
            f"warning: --host {args.host} lets every machine that can reach this one ask the model",
            file=sys.stderr,
        )
    if block:
        page.block_thread()
    return page


@command.entry(memory=LESS_MEMORY)
def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    distributed.prepare_environment()
    args = read_page_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="cores-app-") as folder:
        serve(args, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
