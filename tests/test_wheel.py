"""The package as it is installed: a wheel holds everything, and works beside a user's own files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("model", "dataset", "utils", "configs", "assets")


def copy_of_the_project(to: Path) -> Path:
    """What git tracks, links included."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in (*PARTS, "cores") or "/" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, to / name, follow_symlinks=False)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = copy_of_the_project(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("cores-*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = [path for part in PARTS for path in (ROOT / part).rglob("*") if path.is_file()]
    ours = [
        path
        for path in ours
        if path.suffix in (".py", ".json", ".j2", ".css", ".yaml", ".safetensors")
    ]
    wanted = {f"cores/{path.relative_to(ROOT).as_posix()}" for path in ours}
    wanted |= {f"cores/{name}" for name in ("train_ds.py", "chat.py", "app.py", "py.typed")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    wanted = {name for name in wanted if name.removeprefix("cores/") in tracked}
    assert len(wanted) > 150 and wanted - held == set()
    assert {name.split("/")[0].split("-")[0] for name in held} == {"cores"}


@pytest.mark.slow
def test_it_works_in_a_folder_with_files_of_the_same_names(wheel, tmp_path):
    """In an environment of its own, which sees the libraries of this one."""
    environment, folder = tmp_path / "environment", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(packages)
    libraries = Path(pytest.__file__).parents[1]
    (packages / "libraries.pth").write_text(str(libraries))
    folder.mkdir()
    for name in ("model.py", "utils.py", "dataset.py", "chat.py", "configs.py"):
        (folder / name).write_text("raise ImportError('the wrong one')\n")
    python = environment / "bin" / "python"

    def run(*argv: str) -> str:
        done = subprocess.run([python, *argv], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import cores; from cores import ReasoningSegmenter; print(cores.__file__)"
    assert run("-c", where).strip() == str(packages / "cores" / "__init__.py")
    few = ["--train", "2", "--val", "1", "--semantic", "1"]
    run("-m", "cores", "synthetic", "--out", "data", *few)
    assert "SynthReason|train" in run("-m", "cores", "check", "--dataset_dir", "data")
    shown = "from cores.utils.settings.arguments import parse; print(parse().version)"
    llava = Path(run("-c", shown, "--config", "tiny").strip())
    assert llava == packages / "cores" / "assets" / "tiny" / "llava" and any(llava.iterdir())


def test_a_checkout_without_links(tmp_path):
    """Some systems and archives have files with the names of what links lead to."""
    copy = copy_of_the_project(tmp_path)
    for link in filter(Path.is_symlink, (copy / "cores").iterdir()):
        target = str(link.readlink())
        link.unlink()
        link.write_text(target)
    program = "import cores.chat, cores.utils.settings.programs as p; print(p.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(copy / "utils" / "settings" / "programs.py"), found.stderr
