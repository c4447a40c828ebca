# SPDX-License-Identifier: Apache-2.0
"""Compare class names of configs, checkpoints, data sets and annotation files.

A label is a position in a list of names, and every file has its own list. MMDetection maps labels to the categories of
a COCO file by their order in that file, whatever the names are: the same annotations with ``categories`` in another
order have an AP near 0, without an error. Therefore, all lists are compared by name before work and before an
evaluation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmdet.datasets import BaseVideoDataset, CocoDataset, CocoPanopticDataset
from mmdet.datasets.lvis import LVISV05Dataset, LVISV1Dataset
from mmdet.datasets.objects365 import Objects365V1Dataset, Objects365V2Dataset
from mmdet.evaluation import CocoMetric, CocoPanopticMetric, LVISMetric
from mmdet.registry import DATASETS, METRICS
from mmengine import fileio
from mmengine.logging import print_log

from mmzsq.errors import UserError
from mmzsq.registry import resolve_class

SORTED = (Objects365V1Dataset, Objects365V2Dataset)
"""Data sets that sort the categories of a file by their ids."""
UNFILTERED = (LVISV05Dataset, LVISV1Dataset, LVISMetric)
"""Data sets and metrics that take all categories of a file, whatever the names in the config are."""
SHOWN = 12
"""Number of names that a message lists."""


def read_classes(classes: Any, where: str) -> list[str] | None:
    """Read ``metainfo.classes`` as MMEngine does: a list of names, one name, or a text file with a name in each line.

    Args:
        classes: The value. None and an empty list are no names.
        where: Name of the setting, for messages.

    Raises:
        UserError: If the value is not text, or names a file that is missing or cannot be read.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        try:
            return list(fileio.list_from_file(classes)) or None
        except FileNotFoundError as error:
            if Path(classes).suffix or os.sep in classes:
                raise UserError(
                    f'{where} is {classes!r}, but there is no such file. Set the path of a text file with one name in '
                    'each line, or a list of names'
                ) from error
            return [classes]
        except Exception as error:
            raise UserError(f'{where} is {classes!r}, which cannot be read as a list of names: {error!r}') from error
    if not isinstance(classes, Sequence) or not all(isinstance(name, str) for name in classes):
        raise UserError(f'{where} is {classes!r}, but must be a list of names, or a text file of names')
    return list(classes) or None


def checkpoint_classes(meta: Mapping[str, Any]) -> list[str] | None:
    """Return the class names in ``meta`` of a checkpoint, None if it has none.

    MMDetection 3.x saves them as ``dataset_meta.classes``, its release candidates as ``dataset_meta.CLASSES``, and
    MMDetection 2.x as ``CLASSES``.

    Args:
        meta: ``meta`` of the checkpoint.
    """
    dataset_meta = meta.get('dataset_meta')
    of_data = dataset_meta if isinstance(dataset_meta, Mapping) else {}
    for found in (of_data.get('classes'), of_data.get('CLASSES'), meta.get('CLASSES')):
        names = [found] if isinstance(found, str) else found
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def declared_classes(cfg: Mapping[str, Any]) -> list[str] | None:
    """Return the class names that the data sets of a config declare, without reading data; None if there are none.

    Args:
        cfg: A config of MMDetection.

    Raises:
        UserError: If a file of names is missing.
    """
    for loader in ('val_dataloader', 'test_dataloader', 'train_dataloader'):
        for leaf in _leaves((cfg.get(loader) or {}).get('dataset')):
            if classes := _leaf_classes(leaf, loader):
                return classes
    return None


def choose_classes(
    declared: Sequence[str] | None, meta: Mapping[str, Any], count: int | None, checkpoint: str | None
) -> list[str] | None:
    """Return the class names of a detector: those of the config, which must be those of the checkpoint.

    Args:
        declared: Names that the config declares.
        meta: ``meta`` of the checkpoint.
        count: Number of classes of the detector, None if it is not known. A checkpoint with another number of names is
            ignored: MMDetection saves the 80 names of COCO if a config names no others.
        checkpoint: Name of the checkpoint, for messages.

    Returns:
        The names; None if neither names the classes.

    Raises:
        UserError: If the names differ.
    """
    trained = checkpoint_classes(meta)
    if trained is not None and count is not None and len(trained) != count:
        print_log(
            f'{checkpoint} names {len(trained)} classes, but the detector has {count}: its names are ignored',
            logger='current',
            level=logging.WARNING,
        )
        trained = None
    check_same_classes(
        declared,
        trained,
        'the config',
        f'the checkpoint {checkpoint}',
        'Set metainfo=dict(classes=[...]) of all data sets to the names of the checkpoint, in their order'
        f'{_listed(trained)}. If the checkpoint has wrong names for the same classes, correct its '
        'meta.dataset_meta.classes',
    )
    known = declared or trained
    return None if known is None else list(known)


def check_same_classes(
    first: Sequence[str] | None, second: Sequence[str] | None, of_first: str, of_second: str, remedy: str
) -> None:
    """Refuse two lists of class names that differ. Case, spaces, hyphens and underscores do not matter.

    Args:
        first: Names in the order of the labels. None: nothing is compared.
        second: The same of another source.
        of_first: Name of the first source, for the message.
        of_second: Name of the second source.
        remedy: End of the message: what to do.

    Raises:
        UserError: Names the first difference.
    """
    if first is not None and second is not None and not _same(first, second):
        raise UserError(f'{_difference(first, second, of_first, of_second)}. {remedy}')


def check_data(cfg: Mapping[str, Any], part: str) -> None:
    """Compare the names in a config with the annotation files of its data sets and metrics, without building them.

    Files that do not exist here are not compared.

    Args:
        cfg: A config of MMDetection.
        part: ``'val'``, ``'test'`` or ``'train'``.

    Raises:
        UserError: If a file lists other categories or lists them in another order, or two data sets of the part have
            different classes.
    """
    dataset = (cfg.get(f'{part}_dataloader') or {}).get('dataset')
    check_dataset(dataset, f'{part}_dataloader.dataset')
    classes = next((names for leaf in _leaves(dataset) if (names := _leaf_classes(leaf, part))), None)
    for metric in _mappings(cfg.get(f'{part}_evaluator')):
        kind = _class_of(METRICS, metric.get('type'))
        if classes and issubclass(kind, (CocoMetric, CocoPanopticMetric, LVISMetric)):
            _check_file(metric.get('ann_file'), metric, kind, classes, f'{part}_evaluator')


def check_dataset(dataset: Any, where: str) -> None:
    """Compare the names in the config of a data set with its annotation files, including those of wrapped data sets.

    Args:
        dataset: Config of the data set.
        where: Name of the setting, for messages.

    Raises:
        UserError: See :func:`check_data`.
    """
    first: list[str] | None = None
    for leaf in _leaves(dataset):
        classes = _leaf_classes(leaf, where)
        if classes is None:
            continue
        check_same_classes(
            first,
            classes,
            f'the first data set in {where}',
            f'another one ({leaf.get("ann_file", leaf.get("type"))})',
            'Set the same metainfo.classes in all of them',
        )
        first = classes
        kind = _class_of(DATASETS, leaf.get('type'))
        if _reads_categories(kind):
            _check_file(_joined(leaf), leaf, kind, classes, where)


def check_built_dataset(dataset: Any, classes: Sequence[str] | None, where: str) -> None:
    """Compare the names of a built data set with those of the detector, and its categories with its file.

    Unlike :func:`check_data`, this covers data sets that find their names in files, and those of the user that
    override how a file is read.

    Args:
        dataset: The data set, or a wrapper.
        classes: Names of the detector's classes, None if they are not known.
        where: Name of the setting, for messages.

    Raises:
        UserError: If the names differ.
    """
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if any(part is not None for part in parts):
        for part in parts:
            check_built_dataset(part, classes, where)
        return
    own = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    own = [own] if isinstance(own, str) else own
    check_same_classes(
        classes,
        own,
        'the detector',
        where,
        f'Set metainfo.classes of the data set to those of the detector{_listed(classes)}',
    )
    file, ids = getattr(dataset, 'ann_file', None), getattr(dataset, 'cat_ids', None)
    if not own or not ids or not str(file).endswith('.json') or not _exists(file, dataset):
        return
    names = {category['id']: category['name'] for category in _categories(str(file), dataset)}
    found = [names.get(index, f'category {index}') for index in ids]
    if not (_fits_by_position(found, own) if isinstance(dataset, UNFILTERED) else found == list(own)):
        raise UserError(_file_message(where, str(file), found, own))


def _leaves(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the configs of data sets inside wrappers."""
    if not isinstance(dataset, Mapping):
        return
    inner = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    if any(isinstance(part, Mapping) for part in inner):
        for part in inner:
            yield from _leaves(part)
    else:
        yield dataset


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all mappings inside the config of an evaluator."""
    if isinstance(value, Mapping):
        yield value
        for part in value.values():
            yield from _mappings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _mappings(part)


def _leaf_classes(leaf: Mapping[str, Any], where: str) -> list[str] | None:
    metainfo = leaf.get('metainfo') or {}
    if not isinstance(metainfo, Mapping):
        raise UserError(f'metainfo of {where} is {metainfo!r}, but must be a dict, such as dict(classes=[...])')
    own = read_classes(metainfo.get('classes'), f'metainfo.classes of {where}')
    if own:
        return own
    registered = getattr(_class_of(DATASETS, leaf.get('type')), 'METAINFO', {}).get('classes')
    return read_classes(registered, f'METAINFO of {leaf.get("type")}')


def _class_of(registry: Any, kind: Any) -> type:
    found = resolve_class(registry, kind) if kind else None
    return found if isinstance(found, type) else object


def _reads_categories(kind: type) -> bool:
    """Return whether a data set class takes its labels from ``categories`` of a file, by a rule known here."""
    known = (CocoDataset, BaseVideoDataset, CocoPanopticDataset, *SORTED, LVISV05Dataset, LVISV1Dataset)
    load = getattr(kind, 'load_data_list', None)
    return issubclass(kind, known) and any(load is known_kind.load_data_list for known_kind in known)


def _joined(leaf: Mapping[str, Any]) -> Any:
    """Join ``data_root`` and ``ann_file`` as MMEngine does."""
    file, root = leaf.get('ann_file'), leaf.get('data_root')
    if not isinstance(file, str) or not root or os.path.isabs(file) or '://' in file:
        return file
    return fileio.join_path(str(root), file, backend_args=leaf.get('backend_args'))


def _check_file(file: Any, source: Mapping[str, Any], kind: type, classes: Sequence[str], where: str) -> None:
    """Compare the categories of a file with the names in a config."""
    if not isinstance(file, str) or not file.endswith('.json') or not _exists(file, source):
        return
    categories = list(_categories(file, source))
    if issubclass(kind, SORTED) or source.get('sort_categories'):
        categories.sort(key=lambda category: category['id'])
    names = [category['name'] for category in categories]
    if issubclass(kind, UNFILTERED):
        fits = _fits_by_position(names, classes)
    else:
        names = [name for name in names if name in classes]
        fits = names == list(classes)
    if not fits:
        raise UserError(_file_message(where, file, names, classes))


def _fits_by_position(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether no name stands elsewhere in the other list. LVIS spells some names in two ways."""
    if len(names) != len(classes):
        return False
    moved = (_plain(a) != _plain(b) and (a in classes or b in names) for a, b in zip(names, classes, strict=True))
    return not any(moved)


def _file_message(where: str, file: str, names: Sequence[str], classes: Sequence[str]) -> str:
    absent = next((name for name in classes if name not in names), None)
    if absent is None:
        difference = _difference(classes, names, f'the config ({where})', f'categories of {file}')
    else:
        difference = f'class {list(classes).index(absent)} of the config ({where}), {absent!r}, is not in {file}'
    return (
        f'{difference}. MMDetection counts labels in the order of categories in the file. List all classes there in '
        f'the order of the config (their ids may stay){_listed(classes)}. If the config does not name the classes of '
        'the detector, correct metainfo.classes'
    )


def _exists(file: Any, source: Any) -> bool:
    try:
        return bool(fileio.exists(file, backend_args=_backend_args(source)))
    except Exception:
        # A backend that is not installed here.
        return False


def _backend_args(source: Any) -> Any:
    found = source.get('backend_args') if isinstance(source, Mapping) else getattr(source, 'backend_args', None)
    return dict(found) if found else None


def _categories(file: str, source: Any) -> tuple[Mapping[str, Any], ...]:
    """Read ``categories`` of a COCO file."""
    backend_args = _backend_args(source)
    if backend_args is None and os.path.isfile(file):
        status = os.stat(file)
        return _read_local_categories(file, status.st_mtime_ns, status.st_size)
    return _read_categories(file, backend_args)


@lru_cache(maxsize=16)
def _read_local_categories(file: str, mtime: int, size: int) -> tuple[Mapping[str, Any], ...]:
    return _read_categories(file, None)


def _read_categories(file: str, backend_args: Any) -> tuple[Mapping[str, Any], ...]:
    try:
        content = fileio.load(file, file_format='json', backend_args=backend_args)
        return tuple(dict(id=category['id'], name=str(category['name'])) for category in content['categories'])
    except Exception as error:
        raise UserError(
            f'{file} cannot be read as COCO annotations with a list of categories: {type(error).__name__}: {error}. '
            'Correct the file, or set another ann_file. Validation is optional in training: val_dataloader=None'
        ) from error


def _plain(name: str) -> str:
    return ' '.join(name.replace('_', ' ').replace('-', ' ').casefold().split())


def _same(first: Sequence[str], second: Sequence[str]) -> bool:
    return list(map(_plain, first)) == list(map(_plain, second))


def _difference(first: Sequence[str], second: Sequence[str], of_first: str, of_second: str) -> str:
    """Say where two lists of names differ first."""
    pairs = zip(first, second, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if _plain(a) != _plain(b)), min(len(first), len(second)))
    a, b = (repr(names[index]) if index < len(names) else 'nothing' for names in (first, second))
    counts = f' ({len(first)} and {len(second)} classes)' if len(first) != len(second) else ''
    return f'class names differ: class {index} is {a} in {of_first} and {b} in {of_second}{counts}'


def _listed(classes: Sequence[str] | None) -> str:
    if classes is None:
        return ''
    return f': {", ".join(classes[:SHOWN])}{", ..." if len(classes) > SHOWN else ""}'
