"""Evaluation with a model whose masks are known: what is counted, once, and how it is written
down."""

import json

import numpy as np
import pytest
import torch

from benchmarks.synthreason import table
from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer
from cores.dataset.files.errors import DataError
from cores.dataset.mixture import EvalDataset
from cores.dataset.readers.reasoning import read_record, record_masks
from cores.dataset.sample import LoaderOptions, Sample
from cores.dataset.synthetic import write as synthetic
from cores.model.masks import Generation, Segmentation
from cores.utils import distributed
from cores.utils.evaluation import cli as evaluation_cli
from cores.utils.evaluation import runner
from cores.utils.evaluation.baselines import AnnotatedObject, Guess, SceneBaselines, score_baselines
from cores.utils.evaluation.runner import evaluate
from cores.utils.evaluation.writer import write_reports
from cores.utils.report.results import Report
from cores.utils.report.tables import format_table
from tests.dataset_toys import (
    LEVELS,
    ToyProcessor,
    square,
    write_image,
    write_json,
    write_reason_seg,
)


class FirstRow(torch.nn.Module):
    """Predicts columns 1 to 4 of row 1, then of row 2 … for ``groups`` targets; no mask for the ids
    in ``without_mask``."""

    def __init__(self, without_mask: tuple[str, ...] = (), groups: int = 1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.without_mask, self.groups = without_mask, groups
        self.batches: list[list[tuple[str, str]]] = []
        self.was_training: list[bool] = []

    def _masks(self, batch, row: int) -> torch.Tensor:
        masks = torch.zeros(
            (self.groups, len(LEVELS), *batch.target_masks[row].shape[-2:]), dtype=torch.bool
        )
        for group in range(self.groups):
            masks[group, 1, 1 + group, 1:5] = True
        masks[:, 0, 1:3, 1:5] = True
        return masks[:0] if batch.info[row]["id"] in self.without_mask else masks

    def _see(self, batch) -> range:
        assert batch.sam_pixels.dtype == torch.float64, "inputs take the precision of the weights"
        self.batches.append([(info["id"], info["query"]) for info in batch.info])
        self.was_training.append(self.training)
        return range(len(batch.info))

    def segment(self, batch) -> list[Segmentation]:
        return [
            Segmentation(self._masks(batch, row), torch.zeros(1, len(LEVELS)))
            for row in self._see(batch)
        ]

    def generate(self, batch, tokenizer, max_new_tokens: int) -> list[Generation]:
        assert max_new_tokens == 9
        ids = tokenizer("It is", add_special_tokens=False)["input_ids"] + [
            tokenizer.convert_tokens_to_ids("[SEG]")
        ]
        return [
            Generation(self._masks(batch, row), torch.zeros(1, len(LEVELS)), ids, "")
            for row in self._see(batch)
        ]


class InMemory(list):
    """Samples that stand for an EvalDataset."""

    dataset, options = "toy", LoaderOptions(LEVELS, training=False)

    @property
    def loader(self) -> "InMemory":
        return self


def processor() -> ToyProcessor:
    toy = ToyProcessor()
    toy.levels, toy.conversation = list(LEVELS), "tiny"
    return toy


def toy_data(root, count: int = 3, texts: str = "first", **write) -> EvalDataset:
    """Image i has a target of rows 1 to 1 + i, columns 1 to 4: the first row has an IoU of 1 / (i +
    1) with it."""
    write_reason_seg(root, split="val", count=count, **write)
    return EvalDataset(root, "ReasonSeg|val", LEVELS, exemplar_count=0, texts=texts)


def run(model, data, mode="free", **options):
    return evaluate(model, processor(), data, mode, max_new_tokens=9, progress=False, **options)


def test_every_target_is_scored_once_in_order(tmp_path):
    model = FirstRow()
    report = run(model, toy_data(tmp_path), "teacher_forced", batch_size=2)
    assert [(s.id, s.inter, s.union, s.target_area) for s in report.scores] == [
        ("000", 4, 4, 4),
        ("001", 4, 8, 8),
        ("002", 4, 12, 12),
    ]
    assert report.summary["giou"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert report.summary["ciou"] == pytest.approx(12 / 24)
    assert (report.summary["giou_long"], report.summary["giou_short"]) == (
        pytest.approx((1 + 1 / 3) / 2),
        0.5,
    )
    assert report.summary["emission_rate"] == 1.0
    assert report.summary["first_iou"] == pytest.approx((4 / 8 + 1 + 8 / 12) / 3)
    assert report.summary["wrong_host_rate"] is None
    assert [len(batch) for batch in model.batches] == [2, 1]
    queries = [query for batch in model.batches for _, query in batch]
    assert ["query 0.0?" in queries[0], "query 1.0?" in queries[1], "query 2.0?" in queries[2]] == [
        True
    ] * 3


def test_free_generation_counts_a_missing_mask_as_zero(tmp_path):
    report = run(FirstRow(without_mask=("000",)), toy_data(tmp_path), examples=3)
    assert [(s.iou, s.emitted, s.union) for s in report.scores][:2] == [
        (0.0, False, 4),
        (0.5, True, 8),
    ]
    assert report.summary["emission_rate"] == pytest.approx(2 / 3)
    assert report.summary["giou"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert report.examples[0].masks is None
    assert report.examples[1].masks.shape[0] == len(LEVELS)
    assert "[SEG]" in report.examples[1].answer


def test_a_flood_of_masks_is_reported_and_does_not_help(tmp_path):
    report = run(FirstRow(groups=4), toy_data(tmp_path))
    assert report.summary["extra_masks_rate"] == 3.0
    assert report.summary["n"] == 3


def test_masks_belong_to_targets_in_their_order():
    masks = np.zeros((3, 10, 12), dtype=bool)
    masks[0, 1, 1:5] = masks[1, 2, 1:3] = masks[2, 9, 9] = True
    turns = [("where are they?", answer(LEVELS, None, targets=3))]
    sample = Sample(
        np.zeros((10, 12, 3), np.uint8),
        "a.jpg",
        [Conversation(turns, masks)],
        "reasoning",
        "toy",
        "a",
    )
    report = run(FirstRow(groups=2), InMemory([sample]))
    assert [(s.target, s.iou, s.emitted) for s in report.scores] == [
        (0, 1.0, True),
        (1, 0.5, True),
        (2, 0.0, False),
    ]
    assert report.summary["extra_masks_rate"] == 0.0


def test_published_protocol_asks_the_first_wording_only(tmp_path):
    assert run(FirstRow(), toy_data(tmp_path / "a")).texts == "first"
    every = run(FirstRow(), toy_data(tmp_path / "b", texts="all"))
    assert (every.texts, every.summary["n"]) == ("all", 6)
    assert [(s.id, s.conversation) for s in every.scores][:4] == [
        ("000", 0),
        ("000", 1),
        ("001", 0),
        ("001", 1),
    ]


def test_an_image_with_many_conversations_is_split(tmp_path):
    folder = tmp_path / "reason_seg" / "ReasonSeg" / "val"
    write_image(folder / "000.jpg")
    count = runner.CONVERSATIONS_PER_PASS + 3
    record = {
        "text": [f"query {i}?" for i in range(count)],
        "is_sentence": True,
        "shapes": [square(1, 1, 4, 1)],
    }
    write_json(folder / "000.json", record)
    model = FirstRow()
    report = run(
        model,
        EvalDataset(tmp_path, "ReasonSeg|val", LEVELS, exemplar_count=0, texts="all"),
        examples=1,
    )
    assert [len(batch) for batch in model.batches] == [count - 3, 3]
    assert [s.conversation for s in report.scores] == list(range(count))
    assert len(report.examples) == 1


def test_ignored_pixels_do_not_count(tmp_path):
    folder = tmp_path / "reason_seg" / "ReasonSeg" / "val"
    write_image(folder / "000.jpg")
    # the smaller one is painted over the larger
    shapes = [square(1, 1, 4, 2), square(1, 2, 4, 2, label="ignore")]
    write_json(folder / "000.json", {"text": ["q?"], "is_sentence": True, "shapes": shapes})
    report = run(
        FirstRow(), EvalDataset(tmp_path, "ReasonSeg|val", LEVELS, exemplar_count=0), examples=1
    )
    assert report.summary["giou"] == 1.0
    assert report.scores[0].target_area == 4
    assert report.examples[0].ignore.sum() == 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_images_without_counting_one_twice(tmp_path, monkeypatch, ranks):
    data = toy_data(tmp_path, count=4)
    alone = run(FirstRow(without_mask=("001",)), data, examples=2, gallery=2)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    sent = {}

    def visit(rank: int, gather) -> Report:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "gather_lists", gather)
        return run(FirstRow(without_mask=("001",)), data, examples=2, gallery=2)

    for rank in range(ranks):
        calls = sent.setdefault(rank, [])
        # what this rank would send; a filled list stands for the answer, as an empty share has no
        # report of its own
        visit(
            rank,
            lambda items, calls=calls: (
                calls.append(items) or [((0, 0, 0), alone.scores[0])] * (len(calls) == 1)
            ),
        )
    ids = [score.id for rank in range(ranks) for _, score in sent[rank][0]]
    assert sorted(ids) == ["000", "001", "002", "003"]
    together = iter(
        [[item for rank in range(ranks) for item in sent[rank][kind]] for kind in (0, 1, 2)]
    )
    report = visit(0, lambda items: next(together))
    assert report.summary == alone.summary
    assert [s.id for s in report.scores] == [s.id for s in alone.scores]
    assert [e.name for e in report.examples] == [e.name for e in alone.examples]
    assert report.pictures == alone.pictures
    assert set(alone.pictures) == {"worst", "random", "best", "without_mask"}


def test_limit_and_examples_are_spread_over_the_set(tmp_path):
    report = run(FirstRow(), toy_data(tmp_path, count=5), limit=3, examples=2)
    assert [s.id for s in report.scores] == ["000", "002", "004"]
    assert [e.name[-3:] for e in report.examples] == ["000", "004"]
    assert runner.evenly_spaced(3, 10) == [0, 1, 2]
    assert runner.evenly_spaced(7, 0) == []
    assert len(set(runner.evenly_spaced(100, 99))) == 99


def test_the_training_mode_is_restored(tmp_path):
    model = FirstRow().train()
    run(model, toy_data(tmp_path))
    assert model.training
    assert not any(model.was_training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode 'guess' is unknown"),
        ({"batch_size": 0}, "batch size"),
        ({"limit": 0}, "limit"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, options, message):
    model = FirstRow()
    with pytest.raises(ValueError, match=message):
        run(model, toy_data(tmp_path), **options)
    assert model.batches == []


def test_a_conversation_without_a_mask_is_named(tmp_path):
    data = toy_data(tmp_path)
    sample = data[1]
    sample.conversations[0].masks = np.zeros((0, 10, 12), dtype=bool)
    with pytest.raises(ValueError, match="001.*conversation 0: has no target mask"):
        list(runner.shards_of([sample], [0]))


def test_the_report_is_written_whole(tmp_path):
    report = run(FirstRow(without_mask=("002",)), toy_data(tmp_path), seed=7)
    report.config = {"lr": 0.1}
    report.to_json(tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["unit"] == "fraction"
    assert (written["seed"], written["config"], written["dataset"]) == (
        7,
        {"lr": 0.1},
        "ReasonSeg|val",
    )
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert len(written["targets"]) == 3
    assert written["targets"][2] | {"query": ""} == {
        "dataset": "ReasonSeg|val",
        "id": "002",
        "conversation": 0,
        "target": 0,
        "query": "",
        "is_sentence": True,
        "inter": 0,
        "union": 12,
        "iou": 0.0,
        "emitted": False,
        "extra_masks": 0,
        "target_area": 12,
        "image_area": 120,
        "answer": "It is [SEG]",
        "first_iou": None,
        "first_host_iou": None,
        "inside_host": None,
    }
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "report.json"]


def test_tables_print_percent_and_leave_out_what_is_unknown(tmp_path):
    report = run(FirstRow(), toy_data(tmp_path))
    table = report.table()
    assert "61.1" in table
    assert "wrong host" not in table
    known = {key: report.summary[key] for key in ("n", "giou", "giou_ci95", "ciou", "ciou_ci95")}
    both = format_table({"free": report.summary, "whole_image": known})
    assert both.splitlines()[-1].startswith("whole image")
    assert "–" in both.splitlines()[-1]
    assert len({len(line) for line in both.splitlines()}) == 1
    assert "gIoU 61.1" in report.line()


def test_write_reports_fills_the_run_folder(tmp_path, capsys):
    data = toy_data(tmp_path / "data")
    reports = [run(FirstRow(), data, mode, examples=2) for mode in ("free", "teacher_forced")]
    config = {"epochs": 2, "steps_per_epoch": 30, "eval_only": False}
    returned = write_reports(reports, data, tmp_path / "run", config, seconds=12.5)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written == returned
    assert written["free"]["giou"] == pytest.approx(0.6111, abs=1e-4)
    assert {
        "free",
        "teacher_forced",
        "emission_rate",
        "baselines",
        "seconds",
        "steps",
        "unit",
    } <= written.keys()
    assert (written["seconds"], written["steps"]) == (12.5, 60)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "metrics.json", "examples.png", "report.html", "targets-free.json", "targets-free.csv",
        "targets-teacher_forced.json", "targets-teacher_forced.csv",
    }  # fmt: skip
    assert "whole image" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- baselines


def rectangle(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((8, 8), dtype=bool)
    mask[rows, columns] = True
    return mask


def two_cars() -> SceneBaselines:
    """Host 0 (24 px) has two wheels of 2 px and a knob, host 1 (32 px) one wheel of 4 px, host 2 no
    wheel."""
    wheels = [rectangle(slice(0, 1), slice(0, 2)), rectangle(slice(2, 3), slice(0, 2))]
    first = AnnotatedObject(
        rectangle(slice(0, 3), slice(0, 8)),
        [("wheel", wheels[0]), ("wheel", wheels[1]), ("knob", wheels[0])],
    )
    second = AnnotatedObject(
        rectangle(slice(4, 8), slice(0, 8)), [("wheel", rectangle(slice(4, 5), slice(0, 4)))]
    )
    return SceneBaselines(
        [first, second, AnnotatedObject(rectangle(slice(3, 4), slice(0, 1)), [])], "wheel"
    )


def test_baselines_are_expectations_over_all_guesses():
    scene = two_cars()
    target = scene.objects[0].union("wheel")
    scores = scene.score(target)
    assert scores["largest_object"] == Guess(0.0, 32.0 + 4.0, 0.0)
    part = scores["random_part_of_the_right_name"]  # two hits of half the target, one miss
    assert (part.inter, part.union, part.iou) == (
        pytest.approx(4 / 3),
        pytest.approx((4 + 4 + 8) / 3),
        pytest.approx(1 / 3),
    )
    # one full hit, one miss; the object without wheels is no candidate
    host = scores["right_part_of_a_random_host"]
    assert (host.inter, host.union, host.iou) == (2.0, 6.0, 0.5)
    ignore = rectangle(slice(2, 3), slice(0, 8))
    assert scene.score(target, ignore)["right_part_of_a_random_host"].union == (2 + 6) / 2


def test_baselines_of_synthreason_read_its_own_records(tmp_path):
    out = synthetic.write_synthreason(tmp_path / "synth", train=1, val=4, semantic=1, queries=1)
    data = EvalDataset(out, "SynthReason|val", LEVELS, exemplar_count=0)
    scores = score_baselines(data)
    names = {
        "whole_image",
        "largest_object",
        "random_part_of_the_right_name",
        "right_part_of_a_random_host",
    }
    assert set(scores) == names
    targets = [mask for i in range(len(data)) for c in data[i].conversations for mask in c.masks]
    assert scores["whole_image"]["giou"] == pytest.approx(
        np.mean([mask.mean() for mask in targets])
    )
    assert {s["n"] for s in scores.values()} == {len(targets)}
    # the target is one of the guesses, so a random host is never worth less than its share of four
    assert scores["right_part_of_a_random_host"]["giou"] >= 0.25
    path = sorted((out / "reason_seg" / "SynthReason" / "val").glob("*.json"))[0]
    record = read_record(path)
    scene = SceneBaselines.from_record(record, (synthetic.SIZE, synthetic.SIZE), path)
    target, _, host = record_masks(record, (synthetic.SIZE, synthetic.SIZE), path)
    index = record["target"]["object"]
    assert np.array_equal(scene.objects[index].union(scene.part), target)
    assert np.array_equal(scene.objects[index].mask, host)


def test_data_without_scenes_have_the_whole_image_only(tmp_path):
    scores = score_baselines(toy_data(tmp_path))
    assert set(scores) == {"whole_image"}
    assert scores["whole_image"]["giou"] == pytest.approx((4 + 8 + 12) / 3 / 120)
    assert scores["whole_image"]["ciou"] == pytest.approx((4 + 8 + 12) / 360)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"scene": {"objects": []}}, "'target'"),
        ({"scene": {"objects": [{"parts": []}]}, "target": {"part": "wheel"}}, "'rle'"),
        ({"scene": {"objects": []}, "target": {"part": "wheel"}}, "no object"),
    ],
)
def test_a_broken_scene_names_file_and_field(record, message):
    with pytest.raises(DataError, match=f"scenes.json: .*{message}"):
        SceneBaselines.from_record(record, (8, 8), "scenes.json")


def test_the_benchmark_states_no_spread_of_one_seed():
    row = {
        "method": "lisa",
        "seed": 0,
        "free": {"giou": 0.5, "ciou": 0.4},
        "teacher_forced": {"giou": 0.6},
    }
    row |= {"emission_rate": 1.0, "seconds": 9}
    assert "±" not in table([row]) and "nan" not in table([row])
    assert table([row, row | {"seed": 1}]).count("±") == 3


def test_a_file_to_compare_that_is_not_there_is_not_a_data_set(tmp_path, capsys):
    assert evaluation_cli.main(["compare", str(tmp_path / "gone.json"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / 'gone.json'}: does not exist; check the path"
    )
