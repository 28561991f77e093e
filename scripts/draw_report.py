"""Draws docs/img/report.png: the beginning of the demo's report, as a browser shows it.

    .venv/bin/python scripts/draw_report.py [--report runs/demo/report.html] [--out FILE]

It needs Chromium (`chromium` or `google-chrome` on the path).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cores.dataset import command  # noqa: E402

if __name__ == "__main__":
    command.guard()

from PIL import Image  # noqa: E402

WIDTH, HEIGHT, SHOWN, COLOURS = 1240, 1760, 820, 160


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "demo" / "report.html")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "report.png")
    args = parser.parse_args(argv)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise ValueError("no chromium or google-chrome on the path; install one")
    if not args.report.is_file():
        raise ValueError(f"{args.report}: not found; `make demo` makes it")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        how = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        how += [f"--user-data-dir={folder}", f"--window-size={WIDTH},{HEIGHT}"]
        page = args.report.resolve().as_uri()
        shoot = [browser, *how, f"--screenshot={shot}", page]
        subprocess.run(shoot, check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB")
    size = SHOWN, round(picture.height * SHOWN / picture.width)
    small = picture.resize(size, Image.Resampling.LANCZOS).quantize(COLOURS)
    small.save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
