# SPDX-License-Identifier: Apache-2.0
"""Storage of a calibration set: a COCO data set whose generation can be interrupted at any time.

    root/
      images/000000.png ...        8-bit RGB
      annotations/instances.json   COCO; written when all shards are complete
      manifest.json                metadata and SHA-256 of all files; written last, completes the set
      shards/settings.json         metadata; written first, claims the directory
      shards/00000.json ...        one record for each shard; written after its images, completes the shard

Every file is written atomically, so the set is consistent at any time, and a kill loses at most the current shard.
Processes on any number of machines that share the directory may write different shards at the same time.
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
from mmzsq.synthesis.set_metadata import build_metadata, check_metadata, join_some, read_json, read_metadata


class CalibrationSet:
    """Synthetic images and their labels on disk.

    Use :meth:`open` to write a set, and :meth:`load` to read one.

    Attributes:
        root: Directory of the set.
        num_images: Number of images in the complete set.
        shard_size: Number of images in each shard; the last may have fewer.
        classes: Class names, in the order of the labels.
        uses_real_labels: Whether any label of a real image was read.
        fingerprint: All values that determine the content, see :meth:`open`.
    """

    def __init__(self, root: Path, metadata: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.root = root
        self.num_images: int = metadata['num_images']
        self.shard_size: int = metadata['shard_size']
        self.classes: tuple[str, ...] = tuple(metadata['classes'])
        self.uses_real_labels: bool = metadata['uses_real_labels']
        self.fingerprint: dict[str, Any] = metadata['fingerprint']
        self._metadata = dict(metadata)
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
        """Start a set, or continue an existing one.

        Any number of processes may open a set at the same time, with the same arguments.

        Args:
            root: Directory of the set; created if missing.
            fingerprint: All values that determine the content: digests of teacher and code, seeds, settings. Nested
                dicts, lists, strings, numbers, None.
            num_images: Number of images in the complete set.
            shard_size: Number of images generated and committed together.
            classes: Class names, in the order of the labels.
            uses_real_labels: Whether any label of a real image is read.
            versions: Software versions by name. They are stored with every shard that this process writes, and may
                differ between the shards of a set.

        Returns:
            The set, open for writing.

        Raises:
            UserError: If the directory holds a set with other settings or other files, if it cannot be written, or if
                ``num_images`` or ``shard_size`` is below 1.
        """
        if num_images < 1 or shard_size < 1:
            raise UserError(
                'a calibration set needs at least one image, and at least one image in each shard, got '
                f'num_images={num_images}, shard_size={shard_size}'
            )
        root = Path(root)
        metadata = build_metadata(
            num_images=num_images,
            shard_size=shard_size,
            classes=classes,
            uses_real_labels=uses_real_labels,
            fingerprint=fingerprint,
        )
        found = read_metadata(root)
        if found is None:
            foreign = sorted(_names(root) - {'shards'})
            # Another process may have started the set in the meantime.
            found = read_metadata(root)
            if foreign and found is None:
                raise UserError(
                    f'{root} holds files but no calibration set ({join_some(foreign, 3)}): '
                    'set zsq.calibration_set.dir to an empty or a new directory'
                )
        if found is not None:
            check_metadata(root, found, metadata)
        make_directory(root / 'shards')
        if not (root / 'shards' / 'settings.json').exists():
            write_atomically(root / 'shards' / 'settings.json', to_json(metadata, indent=1))
        make_directory(root / 'images')
        make_directory(root / 'annotations')
        return cls(root, metadata, versions or {})

    @classmethod
    def load(cls, root: str | Path) -> CalibrationSet:
        """Open a complete set for reading.

        Args:
            root: Directory of the set.

        Returns:
            The set.

        Raises:
            UserError: If there is no set, if files are missing, or if it has another format version.
        """
        root = Path(root)
        metadata = read_metadata(root)
        if metadata is None:
            raise UserError(f'{root} holds no calibration set: generate it with `python tools/generate.py CONFIG`')
        calibration_set = cls(root, metadata, {})
        if not calibration_set.is_complete:
            raise UserError(
                f'the calibration set in {root} is not complete '
                f'({len(calibration_set.missing_shards())} of {calibration_set.num_shards} shards '
                'are missing): run the command that generates it again to continue'
            )
        return calibration_set

    @property
    def num_shards(self) -> int:
        """Number of shards in the complete set."""
        return -(-self.num_images // self.shard_size)

    def shard_images(self, index: int) -> range:
        """Return the indices of the images in shard ``index``.

        Raises:
            IndexError: If there is no such shard.
        """
        if not 0 <= index < self.num_shards:
            raise IndexError(f'there is no shard {index}: the set has {self.num_shards} shards')
        first = index * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))

    def shard_length(self, index: int) -> int:
        """Return the number of images in shard ``index``.

        Raises:
            IndexError: If there is no such shard.
        """
        return len(self.shard_images(index))

    def missing_shards(self) -> list[int]:
        """Return the indices of shards to write: without a record, or with an image that was deleted."""
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
        """Write one shard, which is complete when this method returns, and not before.

        Args:
            index: Index of the shard.
            images: Shape (n, H, W, 3), uint8, RGB.
            labels: One entry for each image: ``bboxes`` (m, 4) xyxy in pixels, ``labels`` (m,), optionally ``masks``
                (m, H, W).
            info: Measurements to store with the shard (seconds, losses); ready for JSON.

        Raises:
            IndexError: If there is no such shard.
            ValueError: If images or labels have another form or number.
            UserError: If the disk is full or not writable; shards written before are kept.
        """
        numbers = self.shard_images(index)
        self._check_shard(images, labels, len(numbers))
        names = [f'{number:06d}.png' for number in numbers]
        # A shard that is written again is incomplete in the meantime, and so is the set.
        delete(self._manifest_path)
        delete(self._record_path(index))
        delete_unfinished(self.root / 'images', set(names))
        delete_unfinished(self.root / 'shards', {self._record_path(index).name})

        def write(name: str, image: np.ndarray) -> str:
            content = _encode_png(image)
            write_atomically(self.root / 'images' / name, content)
            return sha256(content)

        # Encode and sync images in parallel, because the GPU is idle in the meantime.
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

    def merge(self, teacher_sha256: str | None = None) -> None:
        """Write annotations and manifest, which completes the set.

        Call it in one process, after all shards were written.

        Args:
            teacher_sha256: SHA-256 of the teacher's file, for the manifest. The fingerprint has that of its weights.

        Raises:
            UserError: If shards are missing, or the disk is full.
        """
        if self.is_complete:
            return
        missing = self.missing_shards()
        if missing:
            raise UserError(
                f'the calibration set in {self.root} lacks {len(missing)} of {self.num_shards} '
                'shards: run the command that generates it again to continue'
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
            **self._metadata,
            'teacher_sha256': teacher_sha256,
            'annotations_sha256': sha256(annotations),
            'shards': [{key: record[key] for key in ('index', 'versions', 'info', 'images')} for record in records],
        }
        write_atomically(self._manifest_path, to_json(manifest, indent=1))

    def record_health(self, health: Mapping[str, Any]) -> None:
        """Add the health of the images to the manifest of a complete set.

        Args:
            health: Measurements, ready for JSON.

        Raises:
            UserError: If the set is not complete, or the disk is full or not writable.
        """
        manifest = self.manifest
        if manifest is None:
            raise UserError(f'the calibration set in {self.root} is not complete yet')
        shards = manifest.pop('shards')
        write_atomically(self._manifest_path, to_json({**manifest, 'health': health, 'shards': shards}, indent=1))

    @property
    def is_complete(self) -> bool:
        """Whether the set was merged and none of its files was deleted since."""
        manifest = self.manifest
        return (
            manifest is not None
            and self._annotation_path.exists()
            and _names(self.root / 'images').issuperset(_file_names(*manifest['shards']))
        )

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Content of ``manifest.json``; None before the set is merged."""
        return read_json(self._manifest_path) if self._manifest_path.exists() else None

    def verify(self) -> None:
        """Compare every file of a complete set with the SHA-256 in its manifest.

        Raises:
            UserError: If the set is not complete, or if files are missing or changed; the message lists them.
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
                f'{join_some(damaged)}. Delete them and run the command that generates the set '
                'again: it replaces these files and keeps the others'
            )

    def statistics(self) -> dict[str, Any]:
        """Count the images, boxes and classes of a complete set.

        Returns:
            The result of :func:`mmzsq.synthesis.coco_format.statistics`.
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
            raise ValueError(f'images must be uint8 (n, H, W, 3), not {images.dtype} {images.shape}')
        if not len(images) == len(labels) == length:
            raise ValueError(f'the shard needs {length} images, got {len(images)} images and {len(labels)} labels')
        for instances in labels:
            if not instances.bboxes.isfinite().all():
                raise ValueError(f'boxes must be finite, not {instances.bboxes}')
            if not ((instances.labels >= 0) & (instances.labels < len(self.classes))).all():
                raise ValueError(f'labels must be in [0, {len(self.classes)}), not {instances.labels}')


def _encode_png(image: np.ndarray) -> bytes:
    """Encode an RGB image (H, W, 3), uint8, as PNG."""
    encoded, content = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))
    if not encoded:
        raise RuntimeError('OpenCV cannot encode PNG')
    return content.tobytes()


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def _file_names(*shards: Mapping[str, Any]) -> set[str]:
    return {image['file_name'] for shard in shards for image in shard['images']}
