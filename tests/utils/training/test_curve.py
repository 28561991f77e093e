"""Curves are drawn from log.jsonl alone."""

import json

import cv2
import numpy as np
import pytest

from cores.utils.training import curve


def write(folder, values, scores=(), **more):
    folder.mkdir()
    rows = [
        {"kind": "train", "step": 10 * i, "loss": v, "text": v / 2, **more}
        for i, v in enumerate(values, 1)
    ]
    rows += [{"kind": "val", "step": 20 * i, "giou": score} for i, score in enumerate(scores, 1)]
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr'
    )  # still being written
    return folder


def ink(path) -> int:
    """Pixels that are not grey: the curves."""
    picture = cv2.imread(str(path)).astype(int)
    return int(np.count_nonzero(np.ptp(picture, axis=2) > 60))


def test_series_are_the_rows(tmp_path):
    rows = curve.read_run(write(tmp_path / "a", [3, 2, 1], [0.5]))
    assert curve.series(rows, "train", "loss") == ([10, 20, 30], [3, 2, 1])
    assert curve.series(rows, "val", "giou") == ([20], [0.5])


def test_a_picture_of_one_run_and_of_two(tmp_path, capsys):
    a, b = write(tmp_path / "a", [3, 2, 1], [0.2, 0.5]), write(tmp_path / "b", [4, 3, 3])
    assert curve.main([str(a)]) == 0
    assert capsys.readouterr().out == f"{a / 'curve.png'}\n"
    assert (
        curve.main(
            [str(a), str(b), "--out", str(tmp_path / "deep" / "both.png"), "--loss", "loss,text"]
        )
        == 0
    )
    shapes = [cv2.imread(str(p)).shape for p in (a / "curve.png", tmp_path / "deep" / "both.png")]
    assert shapes == [(340, 960, 3)] * 2
    assert ink(tmp_path / "deep" / "both.png") > 1.5 * ink(a / "curve.png") > 500


def test_without_validations_there_is_one_panel_and_spikes_are_marked(tmp_path):
    plain, marked = (
        write(tmp_path / "a", [3, 2, 1]),
        write(tmp_path / "b", [3, 2, 1], median=1.0, samples=["x 1"]),
    )
    for run in (plain, marked):
        assert curve.main([str(run)]) == 0
    assert cv2.imread(str(plain / "curve.png")).shape == (340, 480, 3)
    assert ink(marked / "curve.png") > ink(plain / "curve.png")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere: not found; give run folders"),
        (
            ["a", "--loss", "dice"],
            "'dice' is in no train row of these runs; choose from loss, text",
        ),
        (["a", "--score", "x"], "'x' is in no val row"),
        (["empty"], "has no rows yet"),
        ([], "runs"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [1], [0.5])
    write(tmp_path / "empty", [])
    assert curve.main(argv) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
