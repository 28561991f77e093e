"""The flags of the programs beside train_ds.py. Reading them imports nothing that takes time, so
that help comes at once and a mistake is told before a model's libraries are there."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cores.dataset import command
from cores.dataset.conversation.templates import TEMPLATES
from cores.dataset.numbers import in_range
from cores.model.choices import ATTENTION, PRECISIONS
from cores.utils.settings.arguments import (
    FlagParser,
    Settings,
    build_parser,
    parse,
    refuse_no_version,
)
from cores.utils.settings.flags import SELECTING, UsageError
from cores.utils.settings.typed_path import typed_path

KEY_VARIABLE = "CORES_API_KEY"
MODES = ("free", "teacher_forced")
SEEDS = in_range(int, 0, 2**63 - 1)
CURVE_FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp")


def is_folder(path: str) -> bool:
    return Path(path).is_dir()


def slug(dataset: str) -> str:
    """The name of an evaluation set as a file name: "ReasonSeg|val" -> "ReasonSeg-val"."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in dataset)


def read_training(argv: Sequence[str] | None = None) -> Settings:
    """Flags of train_ds.py."""
    settings = parse(argv)
    refuse_no_version(settings)
    return settings


# ------------------------------------------------------------------------------ asking a model


def add_model_flags(parser: ArgumentParser) -> None:
    """The flags that ``load_segmenter`` reads."""
    add = parser.add_argument
    model = "model folder that the merge script wrote, or a published LISA or CoReS"
    add("--version", required=True, help=model)
    add("--precision", choices=list(PRECISIONS), help="default: as stored")
    for bits in (8, 4):
        weights = f"{bits} bits per weight of the language model"
        add(f"--load_in_{bits}bit", action="store_true", help=weights)
    tower = "CLIP of a published LISA, in place of the one it names"
    add("--vision_tower", "--vision-tower", help=tower)
    kinds = list(ATTENTION)
    add("--attn_implementation", choices=kinds, default="auto", help="attention (default: auto)")
    template = "conversation template (default: that of the training)"
    add("--conv_type", choices=list(TEMPLATES), help=template)
    answer = "longest answer, in tokens (default: 64)"
    add("--max_new_tokens", type=in_range(int, 1), default=64, help=answer)
    length = "longest conversation, in tokens (default: that of the model)"
    add("--model_max_length", type=in_range(int, 1), help=length)
    store = (
        "LLM-Seg, cores+select: folder of a proposal store (default: computed for every picture)"
    )
    add("--proposals", type=Path, help=store)


def refuse_model_flags(args: Namespace) -> None:
    """Raises UsageError for flags of ``add_model_flags`` that contradict each other."""
    if args.load_in_4bit and args.load_in_8bit:
        raise UsageError("--load_in_4bit and --load_in_8bit exclude each other")


def read_chat(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of chat.py."""
    parser = FlagParser("Ask a model about pictures: it answers in words and with masks.")
    add_model_flags(parser)
    add, folder = parser.add_argument, Path("./vis_output")
    masks = "folder for masks and overlays (default: ./vis_output)"
    add("--vis_save_path", type=Path, default=folder, help=masks)
    image = "with --prompt: one answer and the end; alone: the first picture"
    add("--image", type=typed_path, help=image)
    add("--prompt", help="the one question")
    add("--json", action="store_true", help="with --prompt: print the answer as JSON")
    args = parser.parse_args(argv)
    refuse_model_flags(args)
    if args.prompt is not None and args.image is None:
        raise UsageError("--prompt needs an --image")
    if args.json and args.prompt is None:
        raise UsageError("--json needs --image and --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty")
    return args


def read_predict(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of many questions about many pictures."""
    about = "Ask a model about many pictures, and keep the answers in files."
    parser = FlagParser(about, "python -m utils.predict")
    add_model_flags(parser)
    add = parser.add_argument
    folder = "folder of pictures, or a table (.jsonl, .csv) with the columns image and question"
    add("--images", type=Path, required=True, help=folder)
    add("--prompts", help="a question, or a file (.txt) with one in each line, for every picture")
    add("--out", type=Path, required=True, help="folder for the answers; the same continues")
    add("--overlay", action="store_true", help="also write the masks over the pictures")
    pictures = "pictures in one pass (default: 1)"
    add("--batch_size", type=in_range(int, 1), default=1, help=pictures)
    args = parser.parse_args(argv)
    refuse_model_flags(args)
    return args


def read_page(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of app.py."""
    parser = FlagParser("A web page around a model: drop a picture, ask, see how it was found.")
    add_model_flags(parser)
    add = parser.add_argument
    examples = 'JSON list of {"image": path, "question": text} (default: three drawn scenes)'
    add("--examples", type=Path, help=examples)
    host = "address to listen on; 0.0.0.0: every machine that can reach this one"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=in_range(int, 0, 65535), default=7860, help="0: any free one")
    names = "further names under which the page is served, such as that of a proxy before it"
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help=names)
    upload = "largest picture that may be sent"
    add("--max_upload_mb", type=in_range(int, 1), default=20, help=upload)
    add("--max_megapixels", type=in_range(int, 1), default=60, help="largest picture, decoded")
    queue = "questions that may wait, half of them from one address; further ones are refused"
    add("--max_queue", type=in_range(int, 1), default=64, help=queue)
    most = "conversations that are kept, half of them from one address"
    add("--max_conversations", type=in_range(int, 1), default=128, help=most)
    ready = "conversations with all that the model needs in memory; others are read again"
    add("--keep_ready", type=in_range(int, 1), default=8, help=ready)
    disk = "for what visitors send and get, in all"
    add("--max_disk_mb", type=in_range(int, 1), default=2048, help=disk)
    args = parser.parse_args(argv)
    refuse_model_flags(args)
    if args.max_disk_mb <= args.max_upload_mb:
        raise UsageError(
            f"--max_disk_mb is {args.max_disk_mb}; it must be more than --max_upload_mb"
            f" ({args.max_upload_mb})"
        )
    return args


def read_serve(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of the server of OpenAI's protocol."""
    parser = FlagParser("Serve a model by OpenAI's chat protocol.", "python -m utils.serve")
    add_model_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=in_range(int, 0, 65535), default=8000, help="0: any (default: 8000)")
    key = f"what requests must bring; better set {KEY_VARIABLE}, which others cannot see"
    add("--api_key", help=key)
    add("--no_auth", action="store_true", help="other machines may ask without a key")
    names = "without a key: further names under which it is served, as that of a proxy before it"
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help=names)
    add("--served_name", help="of the model, in requests (default: name of the folder)")
    add("--allow_urls", action="store_true", help="fetch pictures from addresses of the web")
    queue = "requests that may wait; further ones get status 429 (default: %(default)s)"
    add("--queue", "--max_queue", type=in_range(int, 0), default=64, help=queue)
    body = "largest request, and largest picture from the web (default: %(default)s)"
    add("--max_body_mb", type=in_range(int, 1), default=20, help=body)
    pixels = "largest picture, decoded (default: %(default)s)"
    add("--max_megapixels", type=in_range(int, 1), default=60, help=pixels)
    seconds = "for an answer, waiting included (default: %(default)g)"
    add("--time_limit", type=in_range(float, 0, above=True), default=300.0, help=seconds)
    ready = "pictures kept as the model reads them, for follow-ups (default: %(default)s)"
    add("--keep_ready", type=in_range(int, 1), default=8, help=ready)
    args = parser.parse_args(argv)
    refuse_model_flags(args)
    if args.api_key is not None and not args.api_key.strip():
        raise UsageError("--api_key is empty; give a key or leave the flag out")
    if args.served_name is not None and not args.served_name.strip():
        raise UsageError("--served_name is empty; give a name or leave the flag out")
    return args


# ------------------------------------------------------------------------------------- merging


def read_merge(argv: Sequence[str] | None = None) -> tuple[Namespace, list[str]]:
    """Flags of the merge script, and the rest, which are flags of train_ds.py."""
    parser = FlagParser("Merge LoRA and save a model folder. Further flags: those of train_ds.py.")
    add = parser.add_argument
    add("--run", help="run folder that train_ds.py wrote, or one of its checkpoints")
    weight = "the same as --run, or a file, a folder, an index or an adapter with trained weights"
    add("--weight", help=weight)
    add("--merged", help="a merged model, to write it in another --layout or --precision")
    add("--which", choices=["best", "last"], help="checkpoint of the run (default: best)")
    add("--save_path", required=True, help="folder to write; must be new or empty")
    stored = "of the stored weights (default: that of the run, or bf16)"
    add("--precision", choices=list(PRECISIONS), help=stored)
    layouts = ["cores", "lisa"]
    add("--layout", choices=layouts, default="cores", help="of the folder (default: cores)")
    args, rest = parser.parse_known_args(argv)
    if sum(map(bool, (args.run, args.weight, args.merged))) != 1:
        raise UsageError("give one of --run RUN_FOLDER, --weight SOURCE and --merged MODEL_FOLDER")
    if args.which and args.merged:
        raise UsageError(
            "--which: --merged is one model, not the checkpoints of a run; leave the flag out"
        )
    if args.merged and rest:
        raise UsageError(f"{' '.join(rest)}: --merged takes no flags of the training")
    build_parser().parse_args(rest)
    folder = Path(args.save_path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder}: exists and is not empty; give another --save_path or delete it"
        )
    return args, rest


# ----------------------------------------------------------------------------------- measuring


def read_evaluation(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """MODEL_OR_RUN and --out, and the rest, which are flags of train_ds.py."""
    parser = FlagParser(
        "Measure a model or a run. All other flags are those of train_ds.py: --val_dataset,"
        " --dataset_dir, --eval_mode free|teacher_forced|both, --eval_texts first|all,"
        " --val_batch_size, --max_new_tokens, --seed …",
        "python -m utils.evaluation",
        epilog="Further commands: `compare A B` and `score --predictions …`, each with its own"
        " --help.",
    )
    add = parser.add_argument
    add("model", help="model folder that the merge script wrote, or run folder of train_ds.py")
    add("--out", type=Path, help="folder for the results (default: MODEL_OR_RUN/eval/DATASET)")
    args, flags = parser.parse_known_args(list(argv))
    if not is_folder(args.model):
        raise UsageError(
            f"{args.model}: no such folder; give a run of train_ds.py or a model that the merge"
            " script wrote"
        )
    build_parser().parse_args(flags)
    return args, flags


def read_score(argv: Sequence[str]) -> Namespace:
    about = "Score another system's masks, with every file of an evaluation."
    parser = FlagParser(about, "python -m utils.evaluation score")
    add = parser.add_argument
    masks = "folder of PNGs named by sample, or a JSON list of RLEs"
    add("--predictions", type=Path, required=True, help=masks)
    add("--val_dataset", required=True, help="evaluation set, name|split")
    add("--dataset_dir", required=True, help="root of all data sets")
    add("--name", help="of the system in tables (default: name of the folder or file)")
    add("--out", type=Path, help="folder for the results (default: runs/NAME/eval/DATASET)")
    how = "how the system answered (default: free)"
    add("--eval_mode", choices=MODES, default="free", help=how)
    wordings = "wordings of a query that are scored (default: first)"
    add("--eval_texts", choices=["first", "all"], default="first", help=wordings)
    rows = "rows of the contact sheet (default: 16)"
    add("--examples", type=in_range(int, 0), default=16, help=rows)
    kinds = "answers of each kind in report.html (default: 8)"
    add("--gallery", type=in_range(int, 0), default=8, help=kinds)
    add("--seed", type=SEEDS, default=0, help="of the bootstrap and of the choice of pictures")
    links = "files may be links out of the data folder"
    add("--follow_links", action="store_true", help=links)
    args = parser.parse_args(list(argv))
    args.name = args.name or args.predictions.resolve().stem
    args.out = args.out or Path("runs") / slug(args.name) / "eval" / slug(args.val_dataset)
    if args.predictions.is_file() and args.predictions.resolve().parent == args.out.resolve():
        raise UsageError(
            f"--out {args.out}: is the folder of --predictions, where results would replace files;"
            " give another folder"
        )
    return args


def read_compare(argv: Sequence[str]) -> Namespace:
    about = "Compare two results on the same data: how large is the difference, can it be chance?"
    parser = FlagParser(about, "python -m utils.evaluation compare")
    add = parser.add_argument
    first = "of the first system: targets-<mode>.json, or a run or result folder that holds it"
    add("a", type=Path, help=first)
    add("b", type=Path, help="the same of the second system, on the same data")
    mode = "which results of folders (default: free where both have it, else teacher_forced)"
    add("--eval_mode", choices=MODES, help=mode)
    add("--html", type=Path, help="also write the comparison as a page")
    changes = "samples that changed most, in each direction (default: 10)"
    add("--top", type=in_range(int, 0), default=10, help=changes)
    add("--seed", type=SEEDS, default=0, help="of the bootstrap")
    return parser.parse_args(list(argv))


def read_any_evaluation(argv: Sequence[str] | None = None) -> Any:
    """For ``command.guard``: any of the three."""
    given = list(command.arguments(argv))
    readers = {"compare": read_compare, "score": read_score}
    if given[:1] and given[0] in readers:
        return readers[given[0]](given[1:])
    return read_evaluation(given)


def read_curve(argv: Sequence[str] | None = None) -> Namespace:
    parser = FlagParser("Curves of runs, from their log.jsonl.", "python -m utils.curve")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders, or log.jsonl files")
    add("--out", type=Path, help="picture to write (default: curve.png in the first run folder)")
    commas = "joined by commas (default: %(default)s)"
    add("--loss", default="loss", help=f"values of the steps, {commas}")
    add("--score", default="giou", help=f"values of the validations, {commas}")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------- preparing


def read_boxes(argv: Sequence[str] | None = None) -> Namespace:
    about = "Masks for annotations that have boxes only (EgoObjects), by SAM."
    parser = FlagParser(about, "python -m utils.boxes_to_masks")
    add = parser.add_argument
    formats = "JSON in the format of COCO, LVIS or EgoObjects"
    add("--annotations", type=Path, required=True, help=formats)
    folder = "folder of the images; those that are not there are left out"
    add("--images", type=Path, required=True, help=folder)
    add("--vision_pretrained", type=Path, required=True, help="SAM checkpoint (.pth) or folder")
    add("--out", type=Path, required=True, help="JSON to write")
    return parser.parse_args(argv)


def read_proposals(argv: Sequence[str] | None = None) -> tuple[Namespace, Settings]:
    """The command's own flags, and the settings of the run."""
    about = "Computes SAM's proposals of the images that a run will see. Further flags: those of"
    parser = FlagParser(f"{about} train_ds.py.", "python -m utils.precompute_proposals")
    jobs = "processes; with GPUs, process i takes GPU i modulo their number"
    parser.add_argument("--jobs", type=in_range(int, 1), default=1, help=jobs)
    ranks = "ranks of the training run: they decide how many images it draws"
    parser.add_argument("--ranks", type=in_range(int, 1), default=1, help=ranks)
    own, rest = parser.parse_known_args(argv)
    settings = parse(rest)
    if settings.method not in SELECTING:
        raise UsageError(
            f"--method {settings.method}: only {' and '.join(SELECTING)} need proposals"
        )
    if not settings.proposals:
        raise UsageError("--proposals is unset; name the folder of the store")
    return own, settings


def read_sam_cache(argv: Sequence[str] | None = None) -> Settings:
    """The settings of the run whose images are embedded."""
    settings = parse(argv, "python -m utils.sam_cache")
    if not settings.sam_cache:
        raise UsageError("--sam_cache: name the folder to fill")
    return settings
