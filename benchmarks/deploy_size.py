# SPDX-License-Identifier: Apache-2.0
"""Measure the sizes of exported files of YOLOv5-n and of the demo's detector.

    python benchmarks/deploy_size.py

Sizes depend on the layers and their bits, not on the values of weights: students here are not trained. All files end
at the raw maps of the head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_models import (
    RESULTS,
    ROOT,
    WORK_DIR,
    build_float,
    build_student,
    command_line,
    describe_versions,
    load_config,
    write_float_files,
    write_result,
)

from mmzsq.deploy import export


@dataclass(frozen=True)
class Case:
    """A detector whose files are measured.

    Attributes:
        name: Stem of its result.
        title: In tables.
        config: Path in the repository.
        size: Height and width of the image, in pixels.
    """

    name: str
    title: str
    config: str
    size: tuple[int, int]


CASES = (
    Case('yolov5-n', 'YOLOv5-n', 'configs/zsq/yolov5-n_w8a8.py', (640, 640)),
    Case('demo', 'the demo (YOLOv5-p)', 'configs/zsq/yolov5-p_shapes_w4a4.py', (256, 256)),
)
FILES = (('w8a8', False), ('w6a6', False), ('w4a8', False), ('w4a4', False), ('w4a8', True), ('w4a4', True))
"""Bits, and whether weights are stored as INT4."""


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Export all files of a detector.

    Args:
        case: The detector.
        folder: Gets the files.

    Returns:
        Bytes by name: ``'float'``, bits, or bits and ``'_int4'``.
    """
    detector = build_float(load_config(case.config))
    sizes: dict[str, int] = {}
    for bits, int4 in FILES:
        options = {'zsq.quantizer.w_bits': int(bits[1]), 'zsq.quantizer.a_bits': int(bits[3])}
        name = f'{bits}_int4' if int4 else bits
        path = folder / f'{case.name}_{name}.onnx'
        student = build_student(load_config(case.config, options), None, detector)
        [sizes[name]] = export(student, path, size=case.size, raw=True, int4=int4).bytes.values()
        if 'float' not in sizes:
            written = write_float_files(detector, path, folder / case.name, case.size)
            sizes['float'] = written['detector'].stat().st_size
    return sizes


def result_of(case: Case, sizes: Mapping[str, int], command: str) -> dict[str, Any]:
    """Return the content of the file of a detector."""
    return dict(
        name=case.name,
        title=case.title,
        size=case.size,
        bytes=dict(sizes),
        command=command,
        versions=describe_versions(),
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, export, write sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    files = WORK_DIR / 'size'
    parser.add_argument('--files', type=Path, default=files, help=f'folder for exported files (default: {files})')
    parser.add_argument('--out', type=Path, default=ROOT / RESULTS, help=f'folder of results (default: {RESULTS})')
    args = parser.parse_args(arguments)
    for case in CASES:
        sizes = measure(case, args.files)
        write_result(args.out / f'size_{case.name}.json', result_of(case, sizes, command_line(arguments)))
        sys.stdout.write(f'{case.title}: {sizes}\n')


if __name__ == '__main__':
    main()
