"""The repository itself: style, and rules that no linter knows."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cores import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "cores", "dataset", "model", "scripts", "tests", "utils")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
SOURCES = [path for path in SOURCES if not path.is_symlink()]


def ruff(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything imported: ``from torch import nn`` gives torch and torch.nn."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def methods_called(tree: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {function.attr for function in calls if isinstance(function, ast.Attribute)}


RESTRICTED_UNPICKLER = Path("dataset/files/refs_pickle.py")
PICKLE_FILES = Path("tests/official_layouts.py")  # writes what the restricted unpickler reads


def pickle_risks(tree: ast.AST, path: Path) -> set[str]:
    """What in a source could read a pickle. ``path``: relative to the repository, as two files may
    do a little more than others."""
    found = {
        name
        for name in imports(tree)
        if name.split(".")[0] in ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib")
    }
    allowed = {RESTRICTED_UNPICKLER: {"UnpicklingError"}, PICKLE_FILES: {"dumps"}}.get(path)
    if allowed is not None and "import pickle as" not in ast.unparse(tree):
        # a class that restricts it
        bases = [base for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for base in n.bases]
        used = [
            n for n in ast.walk(tree) if getattr(getattr(n, "value", None), "id", None) == "pickle"
        ]
        uses = {
            n.attr
            for n in used
            if n not in bases or n.attr != "Unpickler" or path != RESTRICTED_UNPICKLER
        }
        return (found - {"pickle"}) | (uses - allowed)
    # the exception alone is harmless
    return set() if found == {"pickle", "pickle.UnpicklingError"} else found


def test_ruff_finds_nothing():
    found = ruff("check", ".")
    assert found.returncode == 0, found.stdout + "run `make format`, then `make lint`"


def test_ruff_would_format_nothing():
    found = ruff("format", "--check", ".")
    assert found.returncode == 0, found.stdout + "run `make format`"


def test_ruff_is_really_at_work():
    """The rules we rely on are switched on: docstrings of modules, order and use of imports, length
    of lines."""
    source = "import sys\nimport os\nx = '" + "long " * 30 + "'\n"
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--output-format",
            "concise",
            "--stdin-filename",
            "utils/bad.py",
            "-",
        ],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
    ).stdout
    assert {"D100", "I001", "F401", "E501"} <= set(re.findall(r"[A-Z]\d{3}", found))


def test_the_sources_are_seen():
    assert ROOT / "train_ds.py" in SOURCES
    assert Path(__file__).resolve() in SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    assert ast.get_docstring(tree), "every module says what it is for"
    assert "cuda" not in methods_called(tree), (
        "the device follows the tensors: use .to(device), never .cuda()"
    )
    assert not pickle_risks(tree, path.relative_to(ROOT)), (
        "pickles run code when they are read: use safetensors or JSON"
    )
    if path.relative_to(ROOT).parts[0] == "dataset":
        networks = {name for name in imports(tree) if name.startswith("torch.nn")}
        assert not networks, "dataset knows nothing of networks"


def module_name(path: Path) -> str:
    """``path``: relative to the repository; a package is named by its ``__init__``."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES
}
PROGRAM = {name: text for name, text in MODULES.items() if name.split(".")[0] != "tests"}


def _place(name: str) -> str:
    """The module's name by its place in the repository."""
    return name.removeprefix("cores.")


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among ``sources`` (name -> text) that it imports, wherever in its text:
    an import inside a function or for types only hides a circle and leaves it there. Names are
    those of the files: what is imported as cores.model.losses is model.losses.

    ``from model import losses`` imports model.losses; that Python runs the package's ``__init__``
    first is not counted, for otherwise no package could import its own modules by name.
    """
    graph = {}
    for name, text in sources.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {_place(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [_place(f"{node.module}.{alias.name}") for alias in node.names]
                found |= {part if part in sources else _place(node.module) for part in full}
        graph[name] = found & sources.keys() - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that reach themselves by way of others."""

    def reachable(node: str) -> set[str]:
        seen, todo = set(), [node]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return {node for node in graph if node in reachable(node)}


def room(module: str) -> str:
    """The folder below model, dataset, utils … in which a module lives: "model.segmenting". A
    module directly in the package is a room of its own, because some stand below all folders
    (model.config) and some above (model.cores)."""
    return ".".join(module.split(".")[:2])


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of modules, seen from so far away that only rooms are left."""
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, imported in graph.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    return rooms


def test_no_module_imports_itself_by_way_of_others():
    assert {"model.cores", "utils.evaluation", "utils.evaluation.__main__"} <= MODULES.keys()
    assert circles(import_graph(MODULES)) == set()


def test_no_room_imports_itself_by_way_of_others():
    assert circles(room_graph(import_graph(PROGRAM))) == set()


@pytest.mark.parametrize(
    "hidden",
    [
        "import b.c",
        "from b import c",
        "from b.c import x",
        "def f():\n    import b.c",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b.c import x",
    ],
)
def test_a_circle_is_found(hidden):
    sources = {"a": hidden, "b": "", "b.c": "from d import x", "d": "import a", "e": "import a"}
    assert circles(import_graph(sources)) == {"a", "b.c", "d"}
    assert circles(import_graph(sources | {"d": ""})) == set()


def test_a_circle_of_rooms_is_found():
    """No module imports itself, yet neither room could be read, or moved, without the other."""
    sources = {
        "p.a.one": "import p.b.one",
        "p.b.one": "",
        "p.b.two": "import p.a.two",
        "p.a.two": "",
    }
    assert circles(import_graph(sources)) == set()
    assert circles(room_graph(import_graph(sources))) == {"p.a", "p.b"}


BELOW = {  # package: what it may import of ours; programs, scripts and benchmarks may import all
    "dataset": {"dataset"},
    "model": {"dataset", "model"},
    "utils": {"dataset", "model", "utils"},
}


def wrong_directions(sources: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, imported in import_graph(sources).items()
        for other in sorted(imported)
        if other.split(".")[0]
        not in BELOW.get(module.split(".")[0], {other.split(".")[0]} - {"tests"})
    ]


def test_imports_go_one_way():
    """Scripts → utils → model → dataset, and nothing of the program imports its tests."""
    assert {package for package in BELOW if package not in PROGRAM} == set()
    sources = {name: text for name, text in MODULES.items() if not name.startswith("tests.")}
    assert wrong_directions(sources | {"tests": ""}) == []


def test_a_wrong_direction_is_found():
    sources = {"model.a": "import utils.b", "utils.b": "import model.a", "chat": "import tests.c"}
    sources |= {"tests.c": "", "dataset.d": "def f():\n    from model import a"}
    assert wrong_directions(sources) == [
        "model.a imports utils.b",
        "chat imports tests.c",
        "dataset.d imports model.a",
    ]


PARTS = {path.name for path in (ROOT / "cores").iterdir() if path.is_symlink()}


def imports_beside_cores(tree: ast.AST) -> set[str]:
    """A module that is imported by two names is there twice, with classes that are not the same."""
    names = {Path(name).stem for name in PARTS}
    return {name for name in imports(tree) if name.split(".")[0] in names}


def test_everything_is_imported_below_one_name():
    assert {"model", "utils", "dataset", "configs", "train_ds.py", "chat.py"} <= PARTS
    for name in PARTS:
        assert (ROOT / "cores" / name).resolve() == ROOT / name
    found = {name: imports_beside_cores(ast.parse(text)) for name, text in MODULES.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    tree = ast.parse("from utils import build\nimport chat\nfrom cores.utils import a")
    assert imports_beside_cores(tree) == {"utils", "utils.build", "chat"}


def private_imports(sources: dict[str, str]) -> set[str]:
    """Names with a leading underscore that a module takes from another one of ours."""
    ours = {name.split(".")[0] for name in sources}
    return {
        f"{module}: {node.module}.{alias.name}"
        for module, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and _place(node.module or "").split(".")[0] in ours
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }


def test_private_names_stay_at_home():
    assert private_imports(MODULES) == set()
    sources = {"a": "from b import _x, y\nfrom os import _exit", "b": "from __future__ import z"}
    assert private_imports(sources) == {"a: b._x"}


def classes_with_several_meanings(sources: dict[str, str]) -> dict[str, list[str]]:
    """Class name -> the modules that define it, where they are more than one."""
    places: dict[str, list[str]] = {}
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_class_name_means_one_thing():
    assert classes_with_several_meanings(PROGRAM) == {}
    twice = {"a": "class X: pass", "b": "def f():\n    class X: pass\nclass Y: pass"}
    assert classes_with_several_meanings(twice) == {"X": ["a", "b"]}


def test_the_caption_stays_a_caption():
    """model/cores.py is the wiring of the figure: what is wired lives in the rooms."""
    assert len(MODULES["model.cores"].splitlines()) <= 250


def test_the_rules_can_be_broken():
    tree = ast.parse("import pickle\nfrom torch import nn\nx.cuda()")
    assert methods_called(tree) == {"cuda"}
    assert imports(tree) == {"pickle", "torch", "torch.nn"}
    for source, path, found in (
        ("import pickle", "utils/a.py", {"pickle"}),
        ("import joblib.numpy_pickle", "utils/a.py", {"joblib.numpy_pickle"}),
        ("from pickle import UnpicklingError", "utils/a.py", set()),
        (
            "from pickle import UnpicklingError, load",
            "utils/a.py",
            {"pickle", "pickle.UnpicklingError", "pickle.load"},
        ),
        ("import pickle\nclass U(pickle.Unpickler): pass", "dataset/files/refs_pickle.py", set()),
        ("import pickle\npickle.load(f)", "dataset/files/refs_pickle.py", {"load"}),
        (
            "import pickle\npickle.Unpickler(f).load()",
            "dataset/files/refs_pickle.py",
            {"Unpickler"},
        ),
        ("import pickle as p\np.load(f)", "dataset/files/refs_pickle.py", {"pickle"}),
        ("from pickle import load", "dataset/files/refs_pickle.py", {"pickle.load"}),
        ("import pickle\npickle.dump(f)", "dataset/files/refs_pickle.py", {"dump"}),
        ("import pickle\npickle.dumps(f)", "tests/official_layouts.py", set()),
        ("import pickle\npickle.loads(f)", "tests/official_layouts.py", {"loads"}),
        ("import pickle\npickle.dumps(f)", "tests/test_referring.py", {"pickle"}),
    ):
        assert pickle_risks(ast.parse(source), Path(path)) == found, source


def test_every_default_test_file_is_collected():
    """pytest takes test_*.py only: a file with tests under another name would never run."""
    for path in (ROOT / "tests").rglob("*.py"):
        functions = [
            n.name
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.FunctionDef)
        ]
        if any(name.startswith("test_") for name in functions):
            assert path.name.startswith("test_"), f"{path.name} holds tests but is not collected"


def test_recorded_data_are_found_in_one_way():
    """A test looks for what is recorded beside the repository, and skips itself where it is not: a
    path that is counted from a file that moves would skip it for ever."""
    paths = (ROOT / "tests").rglob("*.py")
    found = {p.name for p in paths if '/ "shared"' in p.read_text(encoding="utf-8")}
    assert found == {"dataset_toys.py", Path(__file__).name}


def test_changelog_has_an_entry():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or re.search(r"## \[\d+\.\d+\.\d+\]", text)
    assert re.search(r"^- \S", text, re.MULTILINE)


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert names
    assert [line for line in names if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def setup(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs setup.sh in a copy of the repository's set-up files."""
    (clone / "scripts").mkdir(parents=True, exist_ok=True)
    for name in ("scripts/setup.sh", "requirements.txt", "requirements-optional.txt"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | environment
    return subprocess.run(
        ["bash", "scripts/setup.sh", *arguments],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )


def fake_python(folder: Path, body: str) -> str:
    """A program that may stand for python."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_setup_refuses_an_old_python(tmp_path):
    old = fake_python(tmp_path / "bin", '[[ "$1" == --version ]] && echo Python 3.8.1 || exit 1')
    found = setup(tmp_path / "clone", PYTHON=old, CORES_CACHE=str(tmp_path / "cache"))
    assert found.returncode == 1
    assert "Python 3.8.1, but Python >= 3.11 is needed" in found.stderr
    assert not (tmp_path / "cache").exists()


def test_setup_refuses_a_full_disk(tmp_path):
    fake_python(tmp_path / "bin", "exit 1")
    (tmp_path / "bin" / "df").write_text(
        "#!/bin/sh\necho head\necho disk 10000000 5000000 2097152 71% /\n"
    )
    (tmp_path / "bin" / "df").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    found = setup(
        tmp_path / "clone", PATH=path, PYTHON=sys.executable, CORES_CACHE=str(tmp_path / "cache")
    )
    assert found.returncode == 1
    assert "2 GB free, but the environment needs 9 GB" in found.stderr
    assert not (tmp_path / "clone" / ".venv").exists()


def test_setup_builds_once_and_repairs_an_interrupted_build(tmp_path):
    """A stand-in for python makes "environments" whose pip does nothing, so that only the script
    itself is tested."""
    pip = "#!/bin/sh\\nexit ${PIP_EXIT:-0}\\n"
    python = fake_python(
        tmp_path / "bin",
        f"""if [[ "$1 $2" == "-m venv" ]]; then
            echo built >> {tmp_path}/log; mkdir -p "$3/bin"
            printf '{pip}' > "$3/bin/python"; chmod +x "$3/bin/python"
        else exec {sys.executable} "$@"; fi""",
    )
    options = {"PYTHON": python, "CORES_CACHE": str(tmp_path / "cache")}
    fake_df = tmp_path / "bin" / "df"
    fake_df.write_text("#!/bin/sh\necho head\necho disk 1 1 99999999 1% /\n")
    fake_df.chmod(0o755)
    options["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def built() -> int:
        return (tmp_path / "log").read_text().count("built")

    broken = setup(tmp_path / "one", **options, PIP_EXIT="1")
    assert broken.returncode == 1
    assert "pip could not install" in broken.stderr
    assert not (tmp_path / "one" / ".venv").exists()
    assert setup(tmp_path / "one", **options).returncode == 0
    assert built() == 2
    second = setup(tmp_path / "two", **options)
    assert (second.returncode, second.stderr, built()) == (0, "", 2)
    assert (tmp_path / "one" / ".venv").resolve() == (tmp_path / "two" / ".venv").resolve()
    shared = (tmp_path / "one" / ".venv").resolve()
    for clone in ("one", "two"):  # The page has an environment of its own, which sees the shared.
        assert setup(tmp_path / clone, "app", **options).returncode == 0
    page = (tmp_path / "one" / ".venv-app").resolve()
    (link,) = page.rglob("shared.pth")
    assert Path(link.read_text().strip()).is_relative_to(shared) and page != shared
    assert (built(), page) == (3, (tmp_path / "two" / ".venv-app").resolve())
    assert "no 'ap' to set up" in setup(tmp_path / "one", "ap", **options).stderr
    (tmp_path / "one" / ".venv").unlink()
    (tmp_path / "one" / ".venv").mkdir()
    refused = setup(tmp_path / "one", **options)
    assert refused.returncode == 1
    assert "is not a link made by this script" in refused.stderr


def tracked_files() -> list[Path]:
    """Relative to the repository; skips in a copy without its history."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    return [Path(line) for line in listed.stdout.splitlines()]


# What is neither written by hand nor a text of this project, and where it comes from.
ORIGINS = {
    "LICENSE": "the Apache License, word for word",
    "assets/tiny": "trained by scripts/pretrain_tiny.py on pictures of dataset/synthetic",
    "docs/img": "drawn by this program",
}
TEXTS = {
    ".py",
    ".ipynb",
    ".md",
    ".yaml",
    ".toml",
    ".txt",
    ".sh",
    ".j2",
    ".css",
    ".json",
    ".cff",
    ".yml",
}
PLAIN = {
    "Makefile",
    "Dockerfile",
    ".dockerignore",
    "NOTICE",
    ".gitignore",
    "hostfile",
    ".ci/run",
    "py.typed",
}


def test_every_file_is_ours_or_its_origin_is_named():
    for path in tracked_files():
        if any(path.is_relative_to(origin) for origin in ORIGINS) or (ROOT / path).is_symlink():
            continue
        is_text = path.suffix in TEXTS or path.name in PLAIN or path.as_posix() in PLAIN
        assert is_text, f"{path}: name its origin in ORIGINS and, if it is not ours, in NOTICE"
        if path.name != "NOTICE" and path != Path("tests/test_repo.py"):
            text = (ROOT / path).read_text(encoding="utf-8")
            claims = re.findall(r"copyright \(c\)|SPDX-|licensed under the (?!Apache)", text, re.I)
            assert not claims, f"{path}: whose is it? NOTICE must say so"


def test_licence_and_citation_say_the_same_as_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert __version__ == citation["version"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for reference in citation["references"]:
        assert {"title", "authors", "year", "url"} <= reference.keys()
        assert reference["url"] in readme, f"README does not link {reference['title']}"


def workflows() -> dict[str, dict]:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def test_workflows_run_the_commands_that_everybody_has():
    """``make`` is where a command is defined; a workflow only says when and on what it runs."""
    assert {"ci", "release"} <= workflows().keys()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ran = []
    for workflow in workflows().values():
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] and job["steps"]
            ran += [step["run"] for step in job["steps"] if "run" in step]
            for step in job["steps"]:
                assert "uses" not in step or re.search(r"@(v\d+|release/v\d+)$", step["uses"])
    made = {line.split()[1] for line in ran if line.startswith("make ")}
    assert made <= targets and {"lint", "test", "docs"} <= made


def test_workflows_and_package_say_the_same_of_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = workflows()["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={tested[0]}"
    image = re.search(r"^FROM python:([\d.]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert image and image[1] in tested


def test_the_image_takes_what_the_set_up_needs_before_the_rest():
    """Its layers change when the requirements do, and only then; every copied file exists."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY .*", text, re.MULTILINE)]
    assert all((ROOT / name).exists() for names in copied for name in names)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept_out = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert {"data", "runs", ".venv"} <= kept_out & set(ignored)
