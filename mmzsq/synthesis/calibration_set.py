# SPDX-License-Identifier: Apache-2.0
"""Storage of a calibration set: a COCO data set whose generation can be interrupted at any time.

    root/
      images/000000.png ...        8-bit RGB
      annotations/instances.json   COCO; written when all shards are complete
      manifest.json                metadata and SHA-256 of all files; written last, completes the set
      shards/settings.json         metadata; written first, claims the directory
      shards/00000.json ...        one record for each shard; written after its images, completes the shard
      shards/lock                  locked by the run that writes the set

Every file is written atomically, so the set is consistent at any time, and a kill loses at most the current shard.
Records hold SHA-256 of their images, of the settings and of themselves. A shard whose files differ counts as missing
and is made again. Processes on any number of machines that share the directory may write different shards at the same
time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.logging import print_log
from mmengine.structures import InstanceData

from mmzsq.atomic_files import (
    delete,
    delete_unfinished,
    lock_file,
    make_directory,
    sha256,
    to_json,
    write_atomically,
)
from mmzsq.errors import UserError
from mmzsq.synthesis import coco_format
from mmzsq.synthesis.set_metadata import (
    DamagedFileError,
    build_metadata,
    check_metadata,
    join_some,
    read_json,
    read_metadata,
)


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
        found = _read_metadata_or_heal(root, metadata)
        if found is None:
            foreign = sorted(_names(root) - {'shards'})
            # Another process may have started the set in the meantime.
            found = read_metadata(root)
            if foreign and found is None and not _has_record_of(root, metadata):
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
        calibration_set = cls(root, metadata, versions or {})
        try:
            calibration_set.manifest  # noqa: B018
        except DamagedFileError as error:
            _discard(root, error, metadata)
        return calibration_set

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

    @contextmanager
    def lock(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Let no other run write the set inside the block.

        One process of a run holds the lock. It ends with its process.

        Args:
            on_wait: Called once if another run holds the lock, before waiting for it.

        Raises:
            UserError: If the disk is full or not writable.
        """
        with lock_file(self.root / 'shards' / 'lock', on_wait):
            yield

    def missing_shards(self) -> list[int]:
        """Return the indices of shards to write: without a record, or with a file that is missing or damaged.

        All images of an incomplete set are read and compared with their SHA-256.
        """
        if self.is_complete:
            return []
        records = [self._read_record(index) for index in range(self.num_shards)]
        found = [image for record in records if record is not None for image in record['images']]
        with ThreadPoolExecutor() as pool:
            damage = pool.map(self._find_image_damage, found)
            damaged = {image['file_name'] for image, reason in zip(found, damage, strict=True) if reason is not None}
        missing = [
            index
            for index, record in enumerate(records)
            if record is None or not damaged.isdisjoint(_file_names(record))
        ]
        begun = [index for index in missing if self._record_path(index).exists()]
        if begun:
            print_log(
                f'the calibration set in {self.root} has damaged or missing files: shards '
                f'{join_some([str(index) for index in begun])} are made again',
                logger='current',
                level=logging.WARNING,
            )
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
        names = [_image_name(number) for number in numbers]
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
            'settings': _digest(self._metadata),
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
        write_atomically(self._record_path(index), to_json({**record, 'sha256': _digest(record)}))

    def merge(self, teacher_sha256: str | None = None) -> None:
        """Write annotations and manifest, which completes the set.

        Call it in one process, after all shards were written. All images are read and compared with their SHA-256.

        Args:
            teacher_sha256: SHA-256 of the teacher's file, for the manifest. The fingerprint has that of its weights.

        Raises:
            UserError: If shards are missing or damaged, or the disk is full.
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
        """Content of ``manifest.json``; None before the set is merged.

        Raises:
            DamagedFileError: If the file does not list the images of the set.
        """
        if not self._manifest_path.exists():
            return None
        manifest = read_json(self._manifest_path)
        shards = manifest.get('shards') if isinstance(manifest, dict) else None
        if not isinstance(shards, list) or len(shards) != self.num_shards:
            raise DamagedFileError(self._manifest_path, f"'shards' does not list {self.num_shards} shards")
        if not isinstance(manifest.get('annotations_sha256'), str):
            raise DamagedFileError(self._manifest_path, "it lacks 'annotations_sha256'")
        for index, shard in enumerate(shards):
            if not self._lists_images(shard, index) or not isinstance(shard.get('info'), dict):
                raise DamagedFileError(self._manifest_path, f"'shards' has a wrong entry {index}")
        return manifest

    def verify(self) -> None:
        """Compare every file of a complete set with the SHA-256 in its manifest.

        Raises:
            UserError: If the set is not complete, or if files are missing or changed; the message lists them.
        """
        manifest = self.manifest
        if manifest is None:
            raise UserError(f'the calibration set in {self.root} is not complete yet')
        images = [image for shard in manifest['shards'] for image in shard['images']]
        with ThreadPoolExecutor() as pool:
            reasons = list(pool.map(self._find_image_damage, images))
        found = {'annotations/instances.json': _find_damage(self._annotation_path, manifest['annotations_sha256'])}
        found |= {f'images/{image["file_name"]}': reason for image, reason in zip(images, reasons, strict=True)}
        damaged = [f'{name} ({reason})' for name, reason in found.items() if reason is not None]
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

    def _read_record(self, index: int) -> dict[str, Any] | None:
        """Return the record of a shard; None if it is missing, damaged or of other settings."""
        path = self._record_path(index)
        if not path.exists():
            return None
        try:
            record = read_json(path)
        except DamagedFileError:
            return None
        if not isinstance(record, dict) or record.pop('sha256', None) != _digest(record):
            return None
        if record.get('settings') != _digest(self._metadata) or not self._lists_images(record, index):
            return None
        return record

    def _lists_images(self, shard: Any, index: int) -> bool:
        """Return whether a record or an entry of the manifest lists the images of shard ``index``."""
        images = shard.get('images') if isinstance(shard, dict) else None
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            return False
        names = [_image_name(number) for number in self.shard_images(index)]
        return [image.get('file_name') for image in images] == names and all('sha256' in image for image in images)

    def _find_image_damage(self, image: Mapping[str, Any]) -> str | None:
        return _find_damage(self.root / 'images' / image['file_name'], image['sha256'])

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


def _read_metadata_or_heal(root: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the metadata of a set to continue, and delete a damaged file that this run can write again.

    Args:
        root: Directory of the set.
        metadata: Settings of this run.
    """
    try:
        return read_metadata(root)
    except DamagedFileError as error:
        _discard(root, error, metadata)
    return read_metadata(root)


def _discard(root: Path, error: DamagedFileError, metadata: Mapping[str, Any]) -> None:
    """Delete a damaged manifest, or damaged settings beside shards of the same settings.

    Raises:
        UserError: If nothing else in the directory tells what it holds.
    """
    settings = root / 'shards' / 'settings.json'
    if not (error.path != settings and settings.is_file()) and not _has_record_of(root, metadata):
        raise UserError(
            f'{error.path} is damaged ({error.reason}), and no shard in {root} has the settings of this run: delete '
            'the directory, or set zsq.calibration_set.dir to another'
        ) from error
    print_log(f'{error.path} is damaged ({error.reason}): it is written again', 'current', logging.WARNING)
    delete(error.path)


def _has_record_of(root: Path, metadata: Mapping[str, Any]) -> bool:
    """Return whether a shard of a set without settings was made with these settings."""
    digest = _digest(metadata)
    for path in sorted((root / 'shards').glob('[0-9]*.json')):
        try:
            record = read_json(path)
        except DamagedFileError:
            continue
        if isinstance(record, dict) and record.get('settings') == digest:
            return True
    return False


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(to_json(content))


def _find_damage(path: Path, digest: str) -> str | None:
    """Return how a file differs from the one that was written, None if it does not."""
    # Reading a named pipe would wait for a writer.
    if not path.is_file():
        return 'missing' if not path.exists() else 'no regular file'
    try:
        return None if sha256(path.read_bytes()) == digest else 'changed'
    except OSError as error:
        return error.strerror or str(error)


def _image_name(number: int) -> str:
    return f'{number:06d}.png'


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
