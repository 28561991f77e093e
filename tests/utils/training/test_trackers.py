"""Where a training is reported: the real packages, offline, read back."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cores import train_ds
from cores.utils.settings.arguments import parse
from cores.utils.training import trackers
from cores.utils.training.failures import Interrupted
from cores.utils.training.log import read_log
from tests.backbone_toys import flags, toys
from tests.fork_server import server

# three steps of two epochs, all of them logged
TRAINING = {"eval_mode": "teacher_forced", "examples": 2}


def installed(name: str):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training that was reported to all of them. It failed and went on."""
    names = [name for name in trackers.KINDS if importlib.util.find_spec(name)]
    store = tmp_path_factory.mktemp("stores")
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": store}
    variables |= {"TRACKIO_DIR": store / "trackio"}
    job = {"env": {name: str(value) for name, value in variables.items()}}
    name = "tracked"
    told = {"report_to": ",".join(names), "report_project": "dogs", "log_base_dir": store}
    argv = flags(toys(), exp_name=name, **TRAINING | told)
    # The checkpoint is that of the third step, so that the fourth is done and logged twice.
    trial = server().run("cores.train_ds", argv, faults={"nan_gradient": [5]}, **job)
    assert trial.codes == [3], trial.output
    assert [r["step"] for r in read_log(store / name / "log.jsonl")] == [1, 2, 3, 3, 4]
    trial = server().run("cores.train_ds", argv, **job)
    assert trial.codes == [0], trial.output
    assert "--report_to" not in trial.output, "no warning"
    return store / name


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name of a curve -> its (step, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_log(run / "log.jsonl"):
        for name, value in trackers.numbers_of(row, row["kind"]).items():
            curves.setdefault(name, []).append((row["step"], value))
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curves["val/giou"]] == [3, 6]
    metrics = json.loads((run / "metrics.json").read_text())["teacher_forced"]
    return curves | {"final/teacher_forced/giou": [(6, metrics["giou"])]}


def assert_curves(found: dict[str, list[tuple[int, float]]], run: Path, rel: float = 1e-12):
    for name, curve in expected(run).items():
        assert [step for step, _ in found[name]] == [step for step, _ in curve], name
        if name not in ("train/samples_per_second",):
            values = [value for _, value in curve]
            assert [value for _, value in found[name]] == pytest.approx(values, rel=rel), name


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True).Reload()
    curves = {}
    for name in board.Tags()["scalars"]:
        last = {event.step: event.value for event in board.Scalars(name)}
        curves[name] = sorted(last.items())
    assert_curves(curves, run, rel=1e-6)  # TensorBoard stores float32.
    assert board.Tags()["images"] == ["examples"]
    assert "settings/text_summary" in board.Tags()["tensors"]


@installed("wandb")
def test_wandb_offline(run):
    kept = json.loads((run / "trackers.json").read_text())["wandb"]
    curves: dict[str, list[tuple[int, float]]] = {}
    records = [record for file in wandb_files(run) for record in wandb_records(file)]
    assert {r.run.run_id for r in records if r.HasField("run")} == {kept}
    begun = [r.run for r in records if r.HasField("run")][0]
    assert (begun.project, begun.display_name) == ("dogs", run.name)
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["lora_r"] == 8 and config["report_project"] == "dogs"
    for record in records:
        if record.HasField("history"):
            row = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in row.items():
                if isinstance(value, (int, float)) and not name.startswith("_"):
                    curves.setdefault(name, []).append((row["_step"], value))
                elif name == "examples":
                    assert value["_type"] == "image-file"
    assert_curves(curves, run)
    assert list((run / "wandb").rglob("examples_*.png"))


def wandb_files(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def wandb_records(file: Path) -> list:
    """The records of an offline file: blocks of 32768 bytes after a header of 7, with pieces of
    records that have a header of 7 themselves (checksum, length, kind), as LevelDB's log has."""
    from wandb.proto import wandb_internal_pb2

    content, place, piece, found = file.read_bytes(), 7, b"", []
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        piece += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found


@installed("mlflow")
def test_mlflow(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(trackers.MLflow._store(parse(["--log_base_dir", str(run.parent)])))
    (found,) = client.search_runs([client.get_experiment_by_name("dogs").experiment_id])
    assert found.info.run_id == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.params["lora_r"] == "8" and len(found.data.params) > 100
    curves = {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    assert_curves(curves, run)
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(run.parent)
    assert "examples.png" in [a.path for a in client.list_artifacts(found.info.run_id)]


@installed("trackio")
def test_trackio(run, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(run.parent / "trackio"))
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as store;"
        f"print(json.dumps([store.get_runs('dogs'), store.get_logs('dogs', {run.name!r})]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, rows = json.loads(said.stdout.splitlines()[-1])
    assert [n["name"] if isinstance(n, dict) else n for n in names] == [run.name]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                curves.setdefault(name, []).append((row["step"], value))
    assert_curves(curves, run)
    assert any("examples" in row for row in rows)


class Failing(trackers.TensorBoard):
    """A tracker whose connection is lost after some rows."""

    rows = 0

    def __init__(self, run):
        self.id = "failing"

    def scalars(self, values, step):
        type(self).rows += 1
        if self.rows == 2:
            raise ConnectionResetError("Connection lost")


class Unreachable(trackers.TensorBoard):
    """One that is not even there at the start."""

    def __init__(self, run):
        raise TimeoutError("no answer\nafter 90 s")


def test_a_tracker_that_fails_ends_no_training(monkeypatch, caplog):
    kinds = trackers.KINDS | {"wandb": Failing, "mlflow": Unreachable}
    monkeypatch.setattr(trackers, "KINDS", kinds)
    monkeypatch.setattr(trackers, "require", lambda s: None)
    monkeypatch.setattr(train_ds, "require", lambda s: None)
    argv = flags(toys(), exp_name="failing", report_to="wandb,tensorboard,mlflow", **TRAINING)
    assert train_ds.main(argv) == 0
    said = [r.getMessage() for r in caplog.records if "--report_to" in r.getMessage()]
    assert said == [
        f"--report_to {name}: failed ({why}), and is left out from here on; log.jsonl has"
        " everything"
        for name, why in (("mlflow", "no answer after 90 s"), ("wandb", "Connection lost"))
    ]
    assert Failing.rows == 2, "it is not asked again"
    run = toys() / "runs" / "failing"
    assert len(read_log(run / "log.jsonl")) == 8 and list((run / "tensorboard").glob("events*"))


def test_a_training_that_starts_over_begins_new_runs(tmp_path, monkeypatch):
    told = []

    class Told(trackers.TensorBoard):
        rewinds = False

        def __init__(self, run):
            self.id = f"run {len(told)}"
            told.append((run.id, []))

        def scalars(self, values, step):
            told[-1][1].append(step)

        def close(self, status):
            told[-1][1].append(status)

    monkeypatch.setattr(trackers, "KINDS", trackers.KINDS | {"tensorboard": Told})
    common = {"epochs": 1, "no_eval": "true", "log_base_dir": tmp_path, "exp_name": "over"}
    for more in ([], ["--no-auto_resume"], []):
        assert train_ds.main([*flags(toys(), **common), *more]) == 0
    steps = [1, 2, 3, "finished"]
    assert told == [(None, steps), (None, steps), ("run 1", ["finished"])]


def test_without_trackers_nothing_is_written_for_them():
    argv = flags(toys(), exp_name="untracked", report_to="none", no_eval="true", epochs=1)
    assert train_ds.main(argv) == 0
    files = {file.name for file in (toys() / "runs" / "untracked").iterdir()}
    assert "log.jsonl" in files and not files & {"tensorboard", "trackers.json", "wandb"}


def test_only_the_main_rank_reports(monkeypatch):
    monkeypatch.setattr(trackers.distributed, "is_main", lambda: False)
    with trackers.reporting(parse([]), 0, False) as found:
        assert found.working == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (Interrupted("asked"), "stopped"), (ValueError("broken"), "failed")],
)
def test_a_tracker_is_told_how_it_ended(error, status, monkeypatch, tmp_path):
    told = []

    class Told(trackers.TensorBoard):
        def __init__(self, run):
            pass

        def close(self, status):
            told.append(status)

    monkeypatch.setattr(trackers, "KINDS", {"tensorboard": Told})
    opened = trackers.reporting(parse(["--log_base_dir", str(tmp_path)]), 0, False)
    with contextlib.suppress(Interrupted, ValueError), opened:
        if error:
            raise error
    assert told == [status]


@pytest.mark.parametrize("value", ["tensorbord", "wandb,none", "wandb,wandb", "all", "wandb,"])
def test_a_tracker_that_is_not_known_is_refused(value, capsys):
    assert train_ds.main(flags(toys(), report_to=value)) == 2
    assert f"error: --report_to {value}: give different names out of" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "extra"), trackers.EXTRAS.items())
def test_a_package_that_is_missing_is_named_with_its_extra(name, extra, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest)
    )
    assert train_ds.main(flags(toys(), exp_name="missing", report_to=name)) == 2
    assert f'pip install "cores[{extra}]"' in capsys.readouterr().err
    assert not (toys() / "runs" / "missing").exists()


@installed("wandb")
def test_wandb_without_a_login_is_refused_before_the_start(tmp_path):
    variables = {"HOME": str(tmp_path), "WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}
    argv = flags(toys(), exp_name="anonymous", report_to="wandb")
    trial = server().run("cores.train_ds", argv, env=variables)
    assert trial.codes == [2] and "run `wandb login`" in trial.output
    assert not (toys() / "runs" / "anonymous").exists()
