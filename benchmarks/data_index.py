"""How a rank starts on a file of PACO-LVIS' size: our memory-mapped index against pycocotools.

    python -m benchmarks.data_index --json FILE    # 3 GB of disk, 6 GB of memory, minutes

Every measurement is a process of its own. The annotation file is generated: its entries have the
fields and about the lengths of those of PACO-LVIS (boxes, polygons, attributes), in random order.
The file is in the page cache when either reader reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np

from benchmarks.shared import benchmark_parser, in_a_process, machine, memory_mb, write_json

IMAGES, CATEGORIES = 45_000, 531
MAX_START_SECONDS, MAX_GROWTH_MB = 5.0, 200.0
READS = 2_000  # images whose annotations are read after the start


def _polygon(rng: np.random.Generator) -> str:
    points = max(3, int(rng.lognormal(3.3, 0.6)))
    angle, radius = np.linspace(0, 6.28, points, endpoint=False), rng.uniform(20, 60, points)
    x, y = 300 + radius * np.cos(angle), 200 + radius * np.sin(angle)
    return json.dumps([np.stack([x, y], 1).round(2).ravel().tolist()])


def generate(path: Path, megabytes: int, seed: int = 0) -> dict:
    """Writes the annotation file; returns what is in it."""
    rng = np.random.default_rng(seed)
    polygons = [_polygon(rng) for _ in range(5_000)]
    image_ids = rng.choice(600_000, IMAGES, replace=False)
    categories = [
        {"id": i, "name": f"thing_{i}", "supercategory": "OBJECT"} for i in range(1, CATEGORIES + 1)
    ]
    count, target = 0, megabytes * 1_000_000
    with path.open("w", encoding="utf-8") as stream:
        stream.write('{"info": {"description": "generated"}, "images": [')
        for number, i in enumerate(image_ids):
            image = {
                "id": int(i),
                "file_name": f"train2017/{i:012d}.jpg",
                "height": 480,
                "width": 640,
                "neg_category_ids": [4, 9],
            }
            stream.write(", " * (number > 0) + json.dumps(image))
        stream.write(f'], "categories": {json.dumps(categories)}, "annotations": [')
        while stream.tell() < target:
            rows = zip(
                rng.choice(image_ids, 10_000),
                rng.integers(1, CATEGORIES + 1, 10_000),
                rng.integers(0, 5_000, 10_000),
                strict=True,
            )
            for image, category, polygon in rows:
                count += 1
                stream.write(
                    f'{", " * (count > 1)}{{"id": {count}, "image_id": {image}, "category_id":'
                    f' {category}, "area": 5021.25, "bbox": [241.5, 142.25, 118.75, 116.5],'
                    f' "iscrowd": 0, "attribute_ids": [3, 17, 44], "obj_ann_id": {count},'
                    ' "dom_color_ids": [], "unknown_color": 0, "segmentation":'
                    f" {polygons[polygon]}}}"
                )
        stream.write("]}")
    return {
        "megabytes": round(path.stat().st_size / 1e6),
        "images": IMAGES,
        "annotations": count,
        "categories": CATEGORIES,
    }


def start_index(path: Path, cache: Path) -> Callable[[], None]:
    """Does what CocoInstances does at its start; returns a function that reads annotations."""
    from cores.dataset.files.index import CocoIndex

    index = CocoIndex.open(path, cache)
    names = list(index.file_names)
    assert len(index.with_instances()) <= len(names) == IMAGES

    def read() -> None:
        for position in np.random.default_rng(0).integers(0, len(index), READS).tolist():
            index.annotations(position)

    return read


def start_pycocotools(path: Path, _: Path) -> Callable[[], None]:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    ids = sorted(coco.imgs)

    def read() -> None:
        for position in np.random.default_rng(0).integers(0, len(ids), READS).tolist():
            coco.loadAnns(coco.getAnnIds(imgIds=ids[position]))

    return read


def measure_start(reader: str, path: Path, cache: Path) -> dict[str, float]:
    """Seconds and memory of one start in this process, then of reading ``READS`` images."""
    import pycocotools.coco  # noqa: F401

    import cores.dataset.files.index  # noqa: F401 (imports are no part of the start)

    before = memory_mb()
    started = time.perf_counter()
    read = {"index": start_index, "pycocotools": start_pycocotools}[reader](path, cache)
    seconds, after = time.perf_counter() - started, memory_mb()
    started = time.perf_counter()
    read()
    later, reading = memory_mb(), time.perf_counter() - started
    found = {
        "seconds": seconds,
        "rss_growth_mb": after["VmRSS"] - before["VmRSS"],
        "peak_growth_mb": after["VmHWM"] - before["VmRSS"],
        "peak_rss_mb": after["VmHWM"],
        "ms_per_image_read": 1000 * reading / READS,
        "own_memory_growth_after_reading_mb": later["RssAnon"] - before["RssAnon"],
        "mapped_growth_after_reading_mb": later["RssFile"] - before["RssFile"],
    }
    return {name: round(value, 3) for name, value in found.items()}


def measure_all(folder: Path, megabytes: int) -> dict:
    """The whole benchmark in ``folder``."""
    path, cache = folder / "annotations.json", folder / "cache"
    content = generate(path, megabytes)
    two_hours = time.time() - 7200  # The index knows a file this old by size, time and inode.
    os.utime(path, (two_hours, two_hours))
    results: dict = {"file": content, "machine": machine()}
    starts = {"first_start": "index", "second_start": "index", "pycocotools": "pycocotools"}
    for name, reader in starts.items():
        results[name] = in_a_process("benchmarks.data_index", "--measure", reader, path, cache)
        print(f"{name}: {results[name]}", flush=True)
    sizes = [p.stat().st_size for p in cache.rglob("*") if p.is_file()]
    results["index_megabytes"] = round(sum(sizes) / 1e6)
    second = results["second_start"]
    results["within_limits"] = (
        second["seconds"] < MAX_START_SECONDS and second["rss_growth_mb"] < MAX_GROWTH_MB
    )
    return results


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=650, help="size of the generated file")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    parser.add_argument(
        "--measure", nargs=3, metavar=("READER", "FILE", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    if args.measure:
        reader, path, cache = args.measure
        print(json.dumps(measure_start(reader, Path(path), Path(cache))))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure_all(Path(folder), args.megabytes)
    write_json(args.json, results)
    limits = f"limits: {MAX_START_SECONDS} s, {MAX_GROWTH_MB} MB"
    print(f"{'within' if results['within_limits'] else 'over'} the {limits}")
    return 0 if results["within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
