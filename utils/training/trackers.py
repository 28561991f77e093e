"""Where a training is reported besides log.jsonl: TensorBoard, Weights & Biases, trackio, MLflow.

    with reporting(settings, step=0, continues=False) as trackers:
        trackers.scalars({"train/loss": 0.7}, step=1)
        trackers.final(metrics, pictures={"examples": file})

A tracker of --report_to gets the settings, the numbers of every row of the log, the final scores
and the contact sheet. Only the main rank reports. ``trackers.json`` in the run folder says which
runs of the trackers are this run's, so that a training that goes on continues them. A tracker that
fails is left out from then on, with one warning: log.jsonl has everything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cores.dataset import command
from cores.dataset.files.write import write_text
from cores.utils import distributed
from cores.utils.settings.arguments import Settings
from cores.utils.settings.flags import UsageError

logger = logging.getLogger(__name__)

IDS = "trackers.json"
PROJECT = "cores"
EXTRAS = {"tensorboard": "train", "wandb": "track", "trackio": "track", "mlflow": "track"}


class Reported(NamedTuple):
    """The training that a tracker is opened for."""

    s: Settings
    step: int
    """The last step that is done; 0 for a new training."""
    id: str | None
    """The tracker's run that goes on, None to begin one."""

    def project(self, variable: str) -> str:
        """``variable``: of the environment, which the tracker itself would read."""
        return self.s.report_project or os.environ.get(variable) or PROJECT


class Tracker(Protocol):
    """What a tracker can do. Whatever it raises ends its part, and not the training."""

    id: str
    """By which a later process finds the run that this one reports to."""
    rewinds: bool
    """Whether steps that a stopped run had reported are to be reported again."""

    def __init__(self, run: Reported): ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, file: Path, step: int) -> None: ...

    def close(self, status: str) -> None:
        """``status``: "finished", "stopped" (it may go on) or "failed"."""


class TensorBoard:
    """Event files in the run folder."""

    id, rewinds = "tensorboard", True  # It drops the steps after ``purge_step``.

    def __init__(self, run: Reported):
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.s.run_dir / "tensorboard")
        self.board = SummaryWriter(folder, purge_step=run.step + 1)
        if run.id is None:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.s.saved().items())
            self.board.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        from cores.dataset.files.images import read_image

        self.board.add_image(name, read_image(file), step, dataformats="HWC")

    def close(self, status: str) -> None:
        self.board.close()


class Wandb:
    """Weights & Biases, with its own variables: WANDB_MODE=offline writes into the run folder."""

    rewinds = False

    def __init__(self, run: Reported):
        import wandb

        self.wandb = wandb
        again: dict[str, Any] = {} if run.id is None else {"id": run.id, "resume": "allow"}
        self.run = wandb.init(
            project=run.project("WANDB_PROJECT"),
            name=run.s.exp_name,
            config=run.s.saved(),
            dir=os.environ.get("WANDB_DIR") or str(run.s.run_dir),
            # The output is that of a command, which has its own ways with it.
            settings=wandb.Settings(console="off"),
            **again,
        )
        self.id = self.run.id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self.run.log({name: self.wandb.Image(str(file))}, step=step)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """trackio's store on this machine (TRACKIO_DIR), shown by ``trackio show``."""

    rewinds = False

    def __init__(self, run: Reported):
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=run.project("TRACKIO_PROJECT"),
            name=run.id or run.s.exp_name,
            config=run.s.saved(),
            resume="never" if run.id is None else "allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self.id = self.run.name

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self.run.log({name: self.trackio.Image(str(file))}, step=step)

    def close(self, status: str) -> None:
        self.run.finish()


class MLflow:
    """The server or folder of MLFLOW_TRACKING_URI; unset, a store beside the runs: mlflow.db, or
    mlruns/ for mlflow-skinny, which has no database."""

    rewinds = False
    STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    MOST_PARAMS, LONGEST = 100, 500  # of one call, and characters of a value

    def __init__(self, run: Reported):
        # A server that does not answer would stop the training for minutes at every row.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        given = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(given or self._store(run.s))
        if run.id is not None:
            self.id = run.id
            self.client.update_run(run.id, status="RUNNING")
            return
        project = run.project("MLFLOW_EXPERIMENT_NAME")
        known = self.client.get_experiment_by_name(project)
        if known:
            experiment = known.experiment_id
        else:  # Beside a database, pictures would go below the folder of the terminal.
            beside = None if given else (self._folder(run.s) / "mlartifacts").as_uri()
            experiment = self.client.create_experiment(project, artifact_location=beside)
        self.id = self.client.create_run(experiment, run_name=run.s.exp_name).info.run_id
        settings = [Param(k, str(v)[: self.LONGEST]) for k, v in run.s.saved().items()]
        for start in range(0, len(settings), self.MOST_PARAMS):
            self.client.log_batch(self.id, params=settings[start : start + self.MOST_PARAMS])

    @staticmethod
    def _folder(s: Settings) -> Path:
        return Path(s.log_base_dir).resolve()

    @classmethod
    def _store(cls, s: Settings) -> str:
        if importlib.util.find_spec("sqlalchemy"):
            return f"sqlite:///{cls._folder(s)}/mlflow.db"
        # Without a word from its user, MLflow takes no folder any more.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        return (cls._folder(s) / "mlruns").as_uri()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(k, v, now, step) for k, v in values.items()])

    def picture(self, name: str, file: Path, step: int) -> None:
        self.client.log_artifact(self.id, str(file))

    def close(self, status: str) -> None:
        self.client.set_terminated(self.id, self.STATUS[status])


KINDS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """Those of a training that work, by name. Without any, its methods do nothing."""

    def __init__(self) -> None:
        self.working: dict[str, Tracker] = {}
        self.going_on: set[str] = set()
        """Of these, those whose run was begun by an earlier process."""
        self.last_step = 0

    @classmethod
    def opened(cls, s: Settings, step: int, continues: bool) -> Trackers:
        """Those of --report_to. ``step``: the last that is done; ``continues``: whether they report
        to the runs that trackers.json names."""
        self = cls()
        self.last_step = step
        ids = _read_ids(s.run_dir / IDS) if continues else {}
        for name in s.trackers:
            try:
                self.working[name] = KINDS[name](Reported(s, step, ids.get(name)))
                if name in ids:
                    self.going_on.add(name)
            except Exception as error:  # Of another program any class may come.
                _warn(name, error)
        ids |= {name: tracker.id for name, tracker in self.working.items()}
        if ids:
            with contextlib.suppress(OSError):  # The first row of the log will say it.
                write_text(s.run_dir / IDS, json.dumps(ids) + "\n")
        return self

    def scalars(self, values: Mapping[str, float], step: int, again: bool = False) -> None:
        """``again``: the step was reported before the run was stopped, and is done anew."""
        self.last_step = max(self.last_step, step)
        told = {name for name in self.going_on if again and not KINDS[name].rewinds}
        self._each(lambda tracker: tracker.scalars(values, step), told)

    def final(self, metrics: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """``metrics``: what metrics.json holds; the scores of both modes are reported at the last
        step."""
        scores = {
            f"final/{mode}/{name}": float(value)
            for mode in ("free", "teacher_forced")
            for name, value in (metrics.get(mode) or {}).items()
            if _is_number(value)
        }
        self.scalars(scores, self.last_step)
        for name, file in pictures.items():
            if file.is_file():
                self._each(partial(_picture, name=name, file=file, step=self.last_step))

    def close(self, status: str) -> None:
        self._each(lambda tracker: tracker.close(status))
        self.working = {}

    def _each(self, action: Callable[[Tracker], object], but: Collection[str] = ()) -> None:
        for name, tracker in list(self.working.items()):
            try:
                if name not in but:
                    action(tracker)
            except Exception as error:
                del self.working[name]
                _warn(name, error)


def _picture(tracker: Tracker, name: str, file: Path, step: int) -> None:
    tracker.picture(name, file, step)


def numbers_of(row: Mapping[str, Any], kind: str) -> dict[str, float]:
    """What of a row of the log a tracker is told."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in row.items()
        if _is_number(value) and name not in ("step", "epoch")
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_ids(file: Path) -> dict[str, str]:
    """Tracker -> its run; {} for a file that is gone or damaged, after which new runs begin."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    found = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in found if isinstance(value, str)}


def _warn(name: str, error: Exception) -> None:
    words = "--report_to %s: failed (%s), and is left out from here on; log.jsonl has everything"
    logger.warning(words, name, command.one_line(error) or type(error).__name__)


def require(s: Settings) -> None:
    """Raises UsageError for a tracker of --report_to whose package is not installed, and for
    Weights & Biases where nobody is logged in and it is not offline."""
    for name in s.trackers:
        if importlib.util.find_spec(name) is None:
            extra = f'pip install "cores[{EXTRAS[name]}]"'
            raise UsageError(f"--report_to {name}: the package is not installed; {extra}")
    if "wandb" in s.trackers:
        import wandb

        online = wandb.setup().settings.mode not in ("offline", "disabled", "dryrun")
        if online and not wandb.login(prompt=False):
            raise UsageError(
                "--report_to wandb: nobody is logged in; run `wandb login` or set WANDB_API_KEY, or"
                " set WANDB_MODE=offline to report into the run folder"
            )


@contextlib.contextmanager
def reporting(s: Settings, step: int, continues: bool) -> Iterator[Trackers]:
    """The trackers of --report_to, closed at the end with how it ended; on other ranks than the
    main one there are none."""
    trackers = Trackers.opened(s, step, continues) if distributed.is_main() else Trackers()
    status = "failed"
    try:
        yield trackers
        status = "finished"
    except BaseException as error:
        if command.explain(error).code == command.STOPPED:
            status = "stopped"
        raise
    finally:
        trackers.close(status)
