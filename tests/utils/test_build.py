"""Settings reach the data that they are about."""

import os

import pytest

from cores.dataset.files.errors import DataError
from cores.utils.build import PromptFormat, build_eval, build_mixture
from cores.utils.settings.arguments import parse
from tests.dataset_toys import write_image
from tests.own_toys import FLAT_ROW, SIZE, write_lines

PROMPT = PromptFormat(["SEG"], 0)


def test_links_out_of_the_data_are_followed_where_they_may_be(tmp_path):
    write_image(tmp_path / "blobs" / "a.jpg", SIZE)
    folder = tmp_path / "data" / "own" / "hub"
    write_lines(folder / "train.jsonl", [FLAT_ROW | {"image": "a.jpg"}])
    os.symlink(tmp_path / "blobs" / "a.jpg", folder / "a.jpg")
    flags = ["--dataset_dir", str(tmp_path / "data"), "--dataset", "own", "--sample_rates", "1"]
    flags += ["--own_data", "hub", "--val_dataset", "own:hub|train", "--workers", "0"]
    flags += ["--exp_name", "x", "--log_base_dir", str(tmp_path)]
    for build in (build_mixture, build_eval):
        with pytest.raises(DataError, match="is a link that leaves .* --follow_links"):
            build(parse(flags), PROMPT)
        data = build(parse([*flags, "--follow_links"]), PROMPT)
        assert data[0].id == "a"
