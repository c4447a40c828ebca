# SPDX-License-Identifier: Apache-2.0
"""The calibration set on disk: an ordinary COCO data set that may be interrupted at any moment.

    root/
      images/000000.png ...        8-bit RGB
      annotations/instances.json   COCO; written when every shard is there
      manifest.json                what made the set, SHA-256 of files; last: the set is complete
      shards/settings.json         what the set is to be; first: it claims the directory
      shards/00000.json ...        one record a shard; after its images: the shard is complete

Every file appears whole, in one step, so that the set is sound at any moment. A kill loses at most
the shard in work. Processes, on any number of machines that share the directory, may write
different shards at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.structures import InstanceData

from mmzsq.atomic_files import (
    delete,
    delete_unfinished,
    make_directory,
    sha256,
    to_json,
    write_atomically,
)
from mmzsq.errors import UserError
from mmzsq.synthesis import coco_format
from mmzsq.synthesis.set_settings import (
    enumerate_some,
    read_json,
    read_settings,
    refuse_other_settings,
    set_settings,
)


class CalibrationSet:
    """Synthetic images and their labels, on disk.

    Made by :meth:`open`, to write, or :meth:`load`, to read.

    Attributes:
        root: Directory of the set.
        num_images: Images in the complete set.
        shard_size: Images in each shard but, perhaps, the last.
        classes: Names, in the order of the labels.
        uses_real_labels: Whether any label of a real image was read.
        fingerprint: What decides the content, as given to :meth:`open`.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.root = root
        self.num_images: int = settings['num_images']
        self.shard_size: int = settings['shard_size']
        self.classes: tuple[str, ...] = tuple(settings['classes'])
        self.uses_real_labels: bool = settings['uses_real_labels']
        self.fingerprint: dict[str, Any] = settings['fingerprint']
        self._settings = dict(settings)
        self._versions = dict(versions)

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        fingerprint: Mapping[str, Any],
        num_images: int,
        shard_size: int,
        classes: Sequence[str],
        uses_real_labels: bool = False,
        versions: Mapping[str, str] | None = None,
    ) -> CalibrationSet:
        """Begin a set, or go on with the one that is there.

        Any number of processes may open one set at once, with the same arguments.

        Args:
            root: Directory of the set; made if missing.
            fingerprint: All that decides the content: digests of teacher and code, seeds, settings.
                Nested dicts, lists, strings, numbers, None.
            num_images: Images in the complete set.
            shard_size: Images made and committed together.
            classes: Names, in the order of the labels.
            uses_real_labels: Whether any label of a real image is read.
            versions: Of the software at work, by name. Kept with every shard that this process
                writes; a set may be continued with others.

        Raises:
            UserError: If the directory holds a set made otherwise, or anything else; if it cannot
                be written; if ``num_images`` or ``shard_size`` is below one.
        """
        if num_images < 1 or shard_size < 1:
            raise UserError(
                'a calibration set needs at least one image, and one image a shard, got '
                f'num_images={num_images}, shard_size={shard_size}'
            )
        root = Path(root)
        settings = set_settings(
            num_images=num_images,
            shard_size=shard_size,
            classes=classes,
            uses_real_labels=uses_real_labels,
            fingerprint=fingerprint,
        )
        found = read_settings(root)
        if found is None:
            foreign = sorted(_names(root) - {'shards'})
            # Another process may have begun the set since the first look.
            found = read_settings(root)
            if foreign and found is None:
                raise UserError(
                    f'{root} holds files but no calibration set ({enumerate_some(foreign, 3)}): '
                    'give an empty or a new directory as zsq.calibration_set.dir'
                )
        if found is not None:
            refuse_other_settings(root, found, settings)
        make_directory(root / 'shards')
        if not (root / 'shards' / 'settings.json').exists():
            write_atomically(root / 'shards' / 'settings.json', to_json(settings, indent=1))
        make_directory(root / 'images')
        make_directory(root / 'annotations')
        return cls(root, settings, versions or {})

    @classmethod
    def load(cls, root: str | Path) -> CalibrationSet:
        """Open a complete set for reading.

        Raises:
            UserError: If there is none, if files are missing, or if a newer version of mmzsq made
                it.
        """
        root = Path(root)
        settings = read_settings(root)
        if settings is None:
            raise UserError(f'{root} holds no calibration set: make it with `python tools/generate.py CONFIG`')
        calibration_set = cls(root, settings, {})
        if not calibration_set.is_complete:
            raise UserError(
                f'the calibration set in {root} is not complete '
                f'({len(calibration_set.missing_shards())} of {calibration_set.num_shards} shards '
                'to go): run the command that makes it again, it goes on from there'
            )
        return calibration_set

    @property
    def num_shards(self) -> int:
        """Shards in the complete set."""
        return -(-self.num_images // self.shard_size)

    def shard_images(self, index: int) -> range:
        """Return which images shard ``index`` holds."""
        if not 0 <= index < self.num_shards:
            raise IndexError(f'shard {index} of {self.num_shards}')
        first = index * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))

    def shard_length(self, index: int) -> int:
        """Return how many images shard ``index`` holds: ``shard_size``, or fewer in the last."""
        return len(self.shard_images(index))

    def missing_shards(self) -> list[int]:
        """List the shards still to write: without a record, or with an image deleted since."""
        if self.is_complete:
            return []
        present = _names(self.root / 'images')
        missing = []
        for index in range(self.num_shards):
            path = self._record_path(index)
            if not path.exists() or not present.issuperset(_file_names(read_json(path))):
                missing.append(index)
        return missing

    def write_shard(
        self,
        index: int,
        images: np.ndarray,
        labels: Sequence[InstanceData],
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one shard; it counts from the moment that this returns, and not before.

        Args:
            index: Of the shard.
            images: Shape (n, H, W, 3), uint8, RGB.
            labels: One entry an image: ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,), perhaps
                ``masks`` (n, H, W).
            info: What is to be remembered of its making (seconds, losses); ready for JSON.

        Raises:
            ValueError: If the arguments are not of this form, or not as many as the shard holds.
            UserError: If the disk is full or not writable; shards written before are kept.
        """
        numbers = self.shard_images(index)
        self._check_shard(images, labels, len(numbers))
        names = [f'{number:06d}.png' for number in numbers]
        # A shard that is made anew does not count meanwhile, and neither does a set that it is part
        # of.
        delete(self._manifest_path)
        delete(self._record_path(index))
        delete_unfinished(self.root / 'images', set(names))
        delete_unfinished(self.root / 'shards', {self._record_path(index).name})

        def write(name: str, image: np.ndarray) -> str:
            content = _encode_png(image)
            write_atomically(self.root / 'images' / name, content)
            return sha256(content)

        # A GPU waits meanwhile: images are encoded side by side, and so is the disk waited for.
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(write, names, images))
        record = {
            'index': index,
            'versions': self._versions,
            'info': info or {},
            'images': [
                {
                    'file_name': name,
                    'width': images.shape[2],
                    'height': images.shape[1],
                    'sha256': digest,
                }
                for name, digest in zip(names, digests, strict=True)
            ],
            'annotations': [coco_format.to_annotations(instances) for instances in labels],
        }
        write_atomically(self._record_path(index), to_json(record))

    def merge(self) -> None:
        """Write annotations and manifest, which makes the set complete.

        For one process, once all shards are there.

        Raises:
            UserError: If shards are missing, or the disk is full.
        """
        if self.is_complete:
            return
        missing = self.missing_shards()
        if missing:
            raise UserError(
                f'the calibration set in {self.root} lacks {len(missing)} of {self.num_shards} '
                'shards: run the command that makes it again, it goes on from there'
            )
        records = [read_json(self._record_path(index)) for index in range(self.num_shards)]
        coco = coco_format.to_coco(
            [image for record in records for image in record['images']],
            [of_image for record in records for of_image in record['annotations']],
            self.classes,
        )
        annotations = to_json(coco)
        paths = (self._annotation_path, self._manifest_path, self.root / 'shards' / 'settings.json')
        for path in paths:
            delete_unfinished(path.parent, {path.name})
        write_atomically(self._annotation_path, annotations)
        manifest = {
            **self._settings,
            'annotations_sha256': sha256(annotations),
            'shards': [{key: record[key] for key in ('index', 'versions', 'info', 'images')} for record in records],
        }
        write_atomically(self._manifest_path, to_json(manifest, indent=1))

    @property
    def is_complete(self) -> bool:
        """Whether the set is merged and none of its files was deleted since."""
        manifest = self.manifest
        return (
            manifest is not None
            and self._annotation_path.exists()
            and _names(self.root / 'images').issuperset(_file_names(*manifest['shards']))
        )

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What ``manifest.json`` holds; None before the set is merged."""
        return read_json(self._manifest_path) if self._manifest_path.exists() else None

    def verify(self) -> None:
        """Compare every file of a complete set with the SHA-256 that was taken when it was made.

        Raises:
            UserError: If the set is not complete, or files are missing or changed; names them.
        """
        manifest = self.manifest
        if manifest is None:
            raise UserError(f'the calibration set in {self.root} is not complete yet')
        expected = {'annotations/instances.json': manifest['annotations_sha256']}
        for shard in manifest['shards']:
            for image in shard['images']:
                expected[f'images/{image["file_name"]}'] = image['sha256']
        damaged = []
        for name, digest in expected.items():
            path = self.root / name
            if not path.exists():
                damaged.append(f'{name} (missing)')
            elif sha256(path.read_bytes()) != digest:
                damaged.append(f'{name} (changed)')
        if damaged:
            raise UserError(
                f'{len(damaged)} files of the calibration set in {self.root} are damaged: '
                f'{enumerate_some(damaged)}. Delete them and run the command that makes the set '
                'again: it makes these anew and keeps the others'
            )

    def statistics(self) -> dict[str, Any]:
        """Count images, boxes, classes and areas of a complete set.

        Returns:
            What :func:`mmzsq.synthesis.coco_format.statistics` does.
        """
        return coco_format.statistics(read_json(self._annotation_path))

    @property
    def _manifest_path(self) -> Path:
        return self.root / 'manifest.json'

    @property
    def _annotation_path(self) -> Path:
        return self.root / 'annotations' / 'instances.json'

    def _record_path(self, index: int) -> Path:
        return self.root / 'shards' / f'{index:05d}.json'

    def _check_shard(self, images: np.ndarray, labels: Sequence[InstanceData], length: int) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f'images are uint8 (n, H, W, 3), not {images.dtype} {images.shape}')
        if not len(images) == len(labels) == length:
            raise ValueError(f'the shard holds {length} images, got {len(images)} images, {len(labels)} labels')
        for instances in labels:
            if not instances.bboxes.isfinite().all():
                raise ValueError(f'boxes are not finite: {instances.bboxes}')
            if not ((instances.labels >= 0) & (instances.labels < len(self.classes))).all():
                raise ValueError(f'labels of {len(self.classes)} classes: {instances.labels}')


def _encode_png(image: np.ndarray) -> bytes:
    """Encode an RGB image (H, W, 3), uint8; lossless."""
    encoded, content = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))
    if not encoded:
        raise RuntimeError('OpenCV cannot encode PNG')
    return content.tobytes()


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def _file_names(*shards: Mapping[str, Any]) -> set[str]:
    return {image['file_name'] for shard in shards for image in shard['images']}
