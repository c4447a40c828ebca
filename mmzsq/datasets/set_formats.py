# SPDX-License-Identifier: Apache-2.0
"""Write a calibration set in the layouts that other quantization tools read.

Many vendors' tools calibrate on images that their user does not have. The synthetic set replaces these images. They
are stored as 8-bit RGB. Tools that take network inputs get normalized floats instead. Each folder holds a
``README.md`` that states layout, color order and normalization, and ``preprocessing.json`` with the same as data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import cv2
import numpy as np

from mmzsq.atomic_files import disk_errors
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet


@dataclass(frozen=True)
class Preprocessing:
    """How a detector turns an image into the input of its network.

    Attributes:
        mean: Mean of each channel of the network's input, for pixels in [0, 255].
        std: Standard deviation of each channel, likewise.
        to_rgb: Whether the network takes RGB; else it takes BGR.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: bool

    @classmethod
    def from_config(cls, data_preprocessor: Mapping[str, Any]) -> Preprocessing:
        """Read MMDetection's ``data_preprocessor``. MMDetection loads images as BGR.

        Args:
            data_preprocessor: Its config: ``mean``, ``std`` and ``bgr_to_rgb``, all optional.
        """
        mean = tuple(float(value) for value in data_preprocessor.get('mean') or (0.0, 0.0, 0.0))
        std = tuple(float(value) for value in data_preprocessor.get('std') or (1.0, 1.0, 1.0))
        return cls(mean, std, bool(data_preprocessor.get('bgr_to_rgb', False)))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the network's input, (3, H, W) float32, for an RGB image (H, W, 3), uint8."""
        pixels = image if self.to_rgb else image[..., ::-1]
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        values = (pixels.astype(np.float32) - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def describe(self) -> str:
        """Return one sentence for a reader."""
        return (
            f'The network takes {"RGB" if self.to_rgb else "BGR"}, (pixel - mean) / std with mean {list(self.mean)} '
            f'and std {list(self.std)} for pixels in [0, 255].'
        )


Writer = Callable[[CalibrationSet, Path, Preprocessing], str]


def check_format(name: str, out: Path) -> None:
    """Refuse an unknown format, and a folder with files.

    Args:
        name: A key of :data:`FORMATS`.
        out: Folder to write.

    Raises:
        UserError: Names the formats, or the folder.
    """
    if name not in FORMATS:
        raise UserError(f'unknown format {name!r}: choose one of {", ".join(FORMATS)}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} already holds files: give a new folder')


def write_format(calibration_set: CalibrationSet, name: str, out: Path, preprocessing: Preprocessing) -> None:
    """Write a complete set in another layout.

    The folder appears whole, by a rename.

    Args:
        calibration_set: A complete set.
        name: A key of :data:`FORMATS`.
        out: Folder to write. It must not exist or be empty.
        preprocessing: That of the detector.

    Raises:
        UserError: If the format is unknown, or ``out`` holds files or cannot be written.
    """
    check_format(name, out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
        try:
            layout = FORMATS[name](calibration_set, part, preprocessing)
            if not calibration_set.statistics()['boxes']:
                layout += '\n\nThe images have no labels: use them for calibration, not for training or evaluation.'
            _write_json(part / 'preprocessing.json', dict(asdict(preprocessing), layout=name))
            (part / 'README.md').write_text(
                f'# Synthetic calibration images for {TITLES[name]}\n\n{layout}\n\n{preprocessing.describe()}\n\n'
                f'{calibration_set.num_images} images. No real image was used to make them'
                f'{", but labels of real images were" if calibration_set.uses_real_labels else ""}.\n',
                encoding='utf-8',
            )
            part.chmod(0o755)
            os.replace(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _coco(calibration_set: CalibrationSet, out: Path, _: Preprocessing) -> str:
    _copy_images(calibration_set, out / 'images')
    (out / 'annotations').mkdir()
    shutil.copyfile(calibration_set.root / 'annotations/instances.json', out / 'annotations/instances.json')
    return '`images/*.png` (8-bit RGB) and `annotations/instances.json` (COCO).'


def _yolo(calibration_set: CalibrationSet, out: Path, _: Preprocessing) -> str:
    _copy_images(calibration_set, out / 'images')
    (out / 'labels').mkdir()
    coco = json.loads((calibration_set.root / 'annotations/instances.json').read_text())
    index = {category['id']: place for place, category in enumerate(coco['categories'])}
    lines: dict[int, list[str]] = {image['id']: [] for image in coco['images']}
    sizes = {image['id']: (image['width'], image['height']) for image in coco['images']}
    for annotation in coco['annotations']:
        width, height = sizes[annotation['image_id']]
        x, y, w, h = annotation['bbox']
        values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        row = f'{index[annotation["category_id"]]} {" ".join(f"{value:.6f}" for value in values)}'
        lines[annotation['image_id']].append(row)
    for image in coco['images']:
        path = out / 'labels' / f'{Path(image["file_name"]).stem}.txt'
        path.write_text(''.join(f'{line}\n' for line in lines[image['id']]))
    names = ''.join(f'  {place}: {json.dumps(category["name"])}\n' for place, category in enumerate(coco['categories']))
    (out / 'data.yaml').write_text(f'path: .\ntrain: images\nval: images\nnames:\n{names}', encoding='utf-8')
    return (
        '`images/*.png` (8-bit RGB), `labels/*.txt` (class, then center x, center y, width and height as shares of the '
        'image) and `data.yaml`.'
    )


def _npy(calibration_set: CalibrationSet, out: Path, _: Preprocessing) -> str:
    _stack(calibration_set, out / 'images.npy', np.uint8, lambda image: image)
    return '`images.npy`: (N, H, W, 3) uint8, RGB, not normalized. Load it with `numpy.load(..., mmap_mode="r")`.'


def _openvino(calibration_set: CalibrationSet, out: Path, preprocessing: Preprocessing) -> str:
    _stack(calibration_set, out / 'inputs.npy', np.float32, preprocessing)
    return (
        '`inputs.npy`: (N, 3, H, W) float32, normalized inputs of the network. With NNCF:\n\n'
        '```python\nimport nncf, numpy, openvino\n\ninputs = numpy.load("inputs.npy", mmap_mode="r")\n'
        'dataset = nncf.Dataset([image[None] for image in inputs])\n'
        'model = nncf.quantize(openvino.Core().read_model("detector.onnx"), dataset)\n```'
    )


def _tensorrt(calibration_set: CalibrationSet, out: Path, preprocessing: Preprocessing) -> str:
    _stack(calibration_set, out / 'inputs.npy', np.float32, preprocessing)
    (out / 'data_loader.py').write_text(POLYGRAPHY_LOADER, encoding='utf-8')
    return (
        '`inputs.npy`: (N, 3, H, W) float32, normalized inputs of the network, and `data_loader.py` for Polygraphy:\n\n'
        '```bash\npolygraphy convert detector.onnx --int8 --data-loader-script data_loader.py --convert-to trt -o '
        'detector.engine\n```\n\nSet the environment variable `INPUT_NAME` if the input of the file is not `images`.'
    )


def _rknn(calibration_set: CalibrationSet, out: Path, _: Preprocessing) -> str:
    _copy_images(calibration_set, out / 'images')
    names = sorted(path.name for path in (out / 'images').iterdir())
    (out / 'dataset.txt').write_text(''.join(f'images/{name}\n' for name in names), encoding='utf-8')
    return (
        '`images/*.png` (8-bit RGB) and `dataset.txt`, one relative path in each line: '
        '`rknn.build(do_quantization=True, dataset="dataset.txt")`. Pass mean and std to `rknn.config`.'
    )


def _hailo(calibration_set: CalibrationSet, out: Path, _: Preprocessing) -> str:
    _stack(calibration_set, out / 'calib_set.npy', np.uint8, lambda image: image)
    return (
        '`calib_set.npy`: (N, H, W, 3) uint8, RGB, not normalized: `runner.optimize(numpy.load("calib_set.npy"))`. '
        'Normalize in the model script.'
    )


POLYGRAPHY_LOADER = '''"""Calibration data for Polygraphy."""

import os
from pathlib import Path

import numpy as np


def load_data():
    """Yield one normalized image (1, 3, H, W) at a time."""
    name = os.environ.get('INPUT_NAME', 'images')
    for image in np.load(Path(__file__).parent / 'inputs.npy', mmap_mode='r'):
        yield {name: np.ascontiguousarray(image[None])}
'''

FORMATS: dict[str, Writer] = dict(
    coco=_coco, yolo=_yolo, npy=_npy, openvino=_openvino, tensorrt=_tensorrt, rknn=_rknn, hailo=_hailo
)
TITLES = dict(
    coco='COCO tools',
    yolo='YOLO tools',
    npy='NumPy',
    openvino='OpenVINO and NNCF',
    tensorrt='TensorRT',
    rknn='RKNN Toolkit',
    hailo='the Hailo Dataflow Compiler',
)


def _images(calibration_set: CalibrationSet) -> Iterator[np.ndarray]:
    for index in range(calibration_set.num_images):
        path = calibration_set.root / 'images' / f'{index:06d}.png'
        image = cv2.imread(str(path))
        if image is None:
            raise UserError(f'{path} is missing or damaged: delete the set and run mmzsq.generate again')
        yield image[..., ::-1]


def _copy_images(calibration_set: CalibrationSet, folder: Path) -> None:
    folder.mkdir()
    for path in sorted((calibration_set.root / 'images').glob('*.png')):
        shutil.copyfile(path, folder / path.name)


def _stack(
    calibration_set: CalibrationSet, path: Path, dtype: Any, convert: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Write all images to one file without holding them in memory."""
    stacked: Any = None
    for index, image in enumerate(_images(calibration_set)):
        value = convert(image)
        if stacked is None:
            shape: Sequence[int] = (calibration_set.num_images, *value.shape)
            stacked = np.lib.format.open_memmap(path, mode='w+', dtype=dtype, shape=tuple(shape))
        stacked[index] = value
    stacked.flush()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
