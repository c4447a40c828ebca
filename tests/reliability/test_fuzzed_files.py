# SPDX-License-Identifier: Apache-2.0
"""Files with any damage are read rightly or refused by :class:`UserError`, never by another exception."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData
from safetensors.torch import save

from mmzsq.checkpoint import load_from_local
from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet
from mmzsq.synthesis.label_samplers.annotation_files import parse_xml, read_coco

bounded = settings(
    max_examples=100,
    # Shrinking a failure takes longer than finding it.
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    # Nothing that differs between two runs of CI.
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


STATE = dict(state_dict={'a.weight': torch.arange(6.0).reshape(2, 3)}, meta=dict(epoch=1, classes=['cat']))


def read(call: Callable[[], Any], named: str) -> Any:
    """Return what a reader returns, or None if it refuses the file by a message that names it."""
    try:
        return call()
    except UserError as error:
        message = str(error)
    assert named in message
    return None


# Damage of bytes.


def changes(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut a file, overwrite bytes of it, or insert and delete some."""

    def cut(length: int) -> bytes:
        return content[:length]

    def overwrite(edits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, value in edits:
            changed[place] = value
        return bytes(changed)

    def splice(edit: tuple[int, int, bytes]) -> bytes:
        place, length, inserted = edit
        return content[:place] + inserted + content[place + length :]

    places = st.integers(0, len(content) - 1)
    return st.one_of(
        places.map(cut),
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(overwrite),
        st.tuples(places, st.integers(0, 20), st.binary(max_size=20)).map(splice),
        st.binary(max_size=200),
    )


def saved(**options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(STATE, content, **options)
    return content.getvalue()


def damaged_pickle() -> st.SearchStrategy[bytes]:
    """Damage the pickle inside of a checkpoint, whose archive stays intact."""
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in records if name.endswith('data.pkl')]

    def packed(pickled: bytes) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, 'w') as archive:
            for record, value in {**records, name: pickled}.items():
                archive.writestr(record, value)
        return content.getvalue()

    return changes(records[name]).map(packed)


CHECKPOINTS = {
    'a.pth': changes(saved()),
    'old.pth': changes(saved(_use_new_zipfile_serialization=False)),
    'pickle.pth': damaged_pickle(),
    'a.safetensors': changes(save(STATE['state_dict'])),
}


@pytest.mark.parametrize(
    'name',
    [
        'a.pth',
        'old.pth',
        'pickle.pth',
        'a.safetensors',
    ],
)
def test_a_damaged_checkpoint_is_read_or_refused(name: str, tmp_path: Path) -> None:
    @bounded
    @given(CHECKPOINTS[name])
    def check(content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        loaded = read(lambda: load_from_local(str(path), 'cpu'), name)
        assert loaded is None or isinstance(loaded, dict)

    check()


@pytest.mark.parametrize('name', ['a.pth', 'pickle.pth'])
def test_a_damaged_file_of_ultralytics_is_refused(name: str, tmp_path: Path) -> None:
    @bounded
    @given(CHECKPOINTS[name])
    def check(content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_ultralytics(path)

    check()


# Damage of the content of JSON files.

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(['../../etc', '/', '\x00', 'images', '000000.png']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def paths_in(value: Any) -> list[list[Any]]:
    """List the paths to every value within nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [[key], *([key, *rest] for rest in paths_in(item))]]


@st.composite
def changed_json(draw: Callable[[Any], Any], content: Any) -> bytes:
    """Replace or delete one value, or two."""
    content = copy.deepcopy(content)
    for path in draw(st.lists(st.sampled_from(paths_in(content)), min_size=1, max_size=2)):
        *outer, last = path
        place = content
        try:
            for key in outer:
                place = place[key]
            if draw(st.booleans()):
                place[last] = draw(VALUES)
            else:
                del place[last]
        except (KeyError, IndexError, TypeError):
            # The other change removed it.
            continue
    return json.dumps(content).encode()


FINGERPRINT = dict(seed=0, synthesis=dict(lr=0.1))


def open_set(root: Path) -> CalibrationSet:
    return CalibrationSet.open(root, fingerprint=FINGERPRINT, num_images=3, shard_size=2, classes=['cat', 'dog'])


def write_set(root: Path) -> None:
    calibration_set = open_set(root)
    for index in calibration_set.missing_shards():
        count = calibration_set.shard_length(index)
        images = np.random.default_rng(index).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        label = InstanceData(bboxes=torch.tensor([[1.0, 2, 9, 10]]), labels=torch.tensor([index % 2]))
        calibration_set.write_shard(index, images, [label] * count)
    calibration_set.merge()


def content_of(root: Path) -> dict[str, bytes]:
    files = [*root.glob('images/*.png'), root / 'annotations/instances.json']
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def whole_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('set') / 'whole'
    write_set(root)
    return root


def restore(root: Path, whole: Path, complete: bool) -> None:
    """Make a set that is whole, or that is whole but for its manifest, without copying what did not change."""
    for path in whole.rglob('*'):
        target = root / path.relative_to(whole)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists() or target.read_bytes() != path.read_bytes():
            target.write_bytes(path.read_bytes())
    if not complete:
        (root / 'manifest.json').unlink()
        (root / 'annotations/instances.json').unlink()


@pytest.mark.parametrize(
    ('name', 'complete'),
    [
        ('manifest.json', True),
        ('shards/settings.json', False),
        ('shards/00000.json', False),
    ],
)
def test_a_damaged_set_is_refused_or_made_whole(name: str, complete: bool, whole_set: Path, tmp_path: Path) -> None:
    root = tmp_path / 'set'
    original = (whole_set / name).read_bytes()
    expected = content_of(whole_set)

    @bounded
    @given(st.one_of(changed_json(json.loads(original)), changes(original)))
    def check(content: bytes) -> None:
        restore(root, whole_set, complete)
        (root / name).write_bytes(content)

        def use() -> dict[str, bytes]:
            write_set(root)
            CalibrationSet.load(root).verify()
            return content_of(root)

        # Whatever a record claims, the set has the images and labels of an undisturbed one.
        assert read(use, str(root)) in (None, expected)

    check()


# Annotation files.

COCO = dict(
    images=[dict(id=1, file_name='a.jpg', width=64, height=48), dict(id=2, file_name='b.jpg', width=64, height=48)],
    annotations=[
        dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0),
        dict(id=2, image_id=2, category_id=2, bbox=[5.5, 5, 20, 20], segmentation=[[5, 5, 25, 5, 25, 25]], iscrowd=1),
    ],
    categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
)


def test_a_damaged_annotation_file_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / 'ann.json'

    @bounded
    @given(st.one_of(changed_json(COCO), changes(json.dumps(COCO).encode())))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        classes, objects = read(lambda: read_coco(path, None), 'ann.json') or ([], [])
        assert all(isinstance(name, str) for name in classes)
        for item in objects:
            assert torch.isfinite(item.bboxes).all()
            assert len(item.bboxes) == len(item.labels)

    check()


@bounded
@given(st.one_of(changes(b'<annotation><object><name>cat</name></object></annotation>'), st.binary(max_size=60)))
def test_damaged_xml_is_parsed_or_refused(content: bytes) -> None:
    try:
        parse_xml(content)
    except ValueError:
        pass
