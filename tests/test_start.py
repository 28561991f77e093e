"""A command answers at once: its help, and what is wrong with its flags, do not wait for torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cores import __main__ as cores_command
from cores import __version__
from cores.dataset import command

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "deepspeed", "matplotlib", "segment_anything")
SCRIPTS = ["train_ds.py", "chat.py", "app.py", "merge_lora_weights_and_save_hf_model.py"]
MODULES = [
    "utils.evaluation",
    "utils.curve",
    "utils.serve",
    "utils.predict",
    "utils.push",
    "utils.boxes_to_masks",
    "utils.sam_cache",
]
MODULES += ["utils.precompute_proposals", "dataset.check", "dataset.synthetic", "dataset.generate"]
PROGRAM = f"""
import runpy, sys
how, sys.argv = sys.argv[1], sys.argv[2:]
try:
    if how == "script":
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print(code or 0, *sorted(set({HEAVY}) & sys.modules.keys()))
"""


def start(how: str, *argv: str) -> tuple[str, str, str]:
    """The last line, which is exit code and heavy modules, then what was printed, and errors."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *printed, last = done.stdout.splitlines()
    return last, "\n".join(printed), done.stderr


@pytest.mark.parametrize("name", cores_command.COMMANDS)
def test_a_command_answers_before_torch(name):
    end, shown, errors = start("module", "cores", name, "--help")
    assert end == "0" and errors == ""
    assert shown.startswith(f"usage: cores {name} ")
    end, shown, errors = start("module", "cores", name, "--no_such_flag")
    assert end == "2" and shown == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_before_torch(script):
    end, shown, errors = start("script", script, "--help")
    assert end == "0" and errors == "" and shown.startswith(f"usage: {script} ")
    end, shown, errors = start("script", script, "--no_such_flag")
    assert end == "2" and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize("module", MODULES)
def test_a_module_answers_before_torch(module):
    end, shown, errors = start("module", module, "--help")
    assert end == "0" and errors == "" and shown.startswith(f"usage: python -m {module} ")
    end, shown, errors = start("module", module, "--no_such_flag")
    assert end == "2" and errors.startswith("error: ") and errors.count("\n") == 1


def test_every_program_is_a_command():
    """Each script and each module of this kind has a name below ``cores``."""
    mains = {entry.module.removeprefix("cores.") for entry in cores_command.COMMANDS.values()}
    assert {Path(script).stem for script in SCRIPTS} <= mains
    rooms = {main.removesuffix(".__main__") for main in mains}
    for module in MODULES:
        thin = ROOT / Path(*module.split("."))
        thin = thin / "__main__.py" if thin.is_dir() else thin.with_suffix(".py")
        assert module in rooms or any(
            f"from cores.{room} import" in thin.read_text() for room in mains
        )


def test_the_table_and_mistakes_of_names(capsys):
    assert cores_command.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cores_command.COMMANDS)
    assert cores_command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cores {__version__}\n"
    assert cores_command.main(["compair"]) == 2
    assert "no command 'compair'; did you mean compare?" in capsys.readouterr().err
    assert cores_command.main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "extra"),
    [("deepspeed", "train"), ("gradio.themes", "app"), ("wandb", "track"), ("pyarrow", "data")],
)
def test_a_missing_package_says_what_brings_it(package, extra):
    end = command.explain(ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert end.code == 2 and not end.defect
    assert f'pip install "cores[{extra}]"' in end.line and f'-e ".[{extra}]"' in end.line
    ours = command.explain(ModuleNotFoundError("No module named 'numpi'", name="numpi"))
    assert ours.defect


def test_the_extras_are_those_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in command.EXTRAS.items():
        brought = " ".join(project["optional-dependencies"][extra]).replace("-", "_")
        assert all(package in brought for package in packages), extra
