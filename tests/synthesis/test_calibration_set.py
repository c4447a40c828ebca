# SPDX-License-Identifier: Apache-2.0
"""A calibration set is a COCO data set, refuses other settings, and can be repaired."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO

from mmzsq.atomic_files import sha256
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet, MultiBoxSampler

SETTINGS: dict[str, Any] = dict(
    fingerprint=dict(teacher='abc', seed=0, priors=[dict(type='BN', weight=0.1)]),
    num_images=5,
    shard_size=2,
    classes=['cat', 'dog', 'bird'],
)
HEIGHT, WIDTH = 24, 32


def make_shard(index: int, count: int) -> tuple[np.ndarray, list[InstanceData]]:
    """Images and labels that depend only on the index of the shard."""
    images = np.random.default_rng(index).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)
    generator = torch.Generator().manual_seed(index)
    return images, MultiBoxSampler((1, 3)).sample(count, (HEIGHT, WIDTH), 3, generator)


def fill(calibration_set: CalibrationSet) -> None:
    for index in calibration_set.missing_shards():
        calibration_set.write_shard(index, *make_shard(index, calibration_set.shard_length(index)), dict(seconds=1.5))


def make(root: Path, **changes: Any) -> CalibrationSet:
    calibration_set = CalibrationSet.open(root, **{**SETTINGS, **changes})
    fill(calibration_set)
    calibration_set.merge()
    return calibration_set


def content(root: Path) -> dict[str, str]:
    """Digest of every file below ``root``, hidden ones included."""
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()) for path in sorted(root.rglob('*')) if path.is_file()
    }


def test_a_set_is_complete_after_all_shards_and_a_merge(tmp_path):
    calibration_set = CalibrationSet.open(tmp_path / 'set', **SETTINGS)
    assert calibration_set.missing_shards() == [0, 1, 2]
    assert [calibration_set.shard_length(index) for index in range(3)] == [2, 2, 1]
    calibration_set.write_shard(1, *make_shard(1, 2))
    assert calibration_set.missing_shards() == [0, 2]
    with pytest.raises(UserError, match='lacks 2 of 3 shards'):
        calibration_set.merge()
    fill(calibration_set)
    assert calibration_set.missing_shards() == []
    assert not calibration_set.is_complete
    calibration_set.merge()
    assert calibration_set.is_complete
    calibration_set.verify()


def test_pycocotools_reads_what_was_written(tmp_path, capsys):
    make(tmp_path)
    coco = COCO(tmp_path / 'annotations' / 'instances.json')
    assert [category['name'] for category in coco.loadCats([1, 2, 3])] == ['cat', 'dog', 'bird']
    assert coco.getImgIds() == [0, 1, 2, 3, 4]
    ids = coco.getAnnIds()
    assert ids == list(range(1, len(ids) + 1))
    written = [label for shard in range(3) for label in make_shard(shard, [2, 2, 1][shard])[1]]
    for image_id, label in enumerate(written):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [a['category_id'] - 1 for a in annotations] == label.labels.tolist()
        xywh = torch.tensor([a['bbox'] for a in annotations])
        xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        torch.testing.assert_close(xyxy, label.bboxes, atol=2e-3, rtol=0)
        assert all(a['iscrowd'] == 0 and 'segmentation' not in a for a in annotations)
        assert [a['area'] for a in annotations] == pytest.approx(xywh[:, 2:].prod(1).tolist(), abs=1e-3)


def test_images_come_back_bit_for_bit_in_rgb(tmp_path):
    make(tmp_path)
    for shard in range(3):
        for offset, image in enumerate(make_shard(shard, [2, 2, 1][shard])[0]):
            with Image.open(tmp_path / 'images' / f'{shard * 2 + offset:06d}.png') as file:
                assert file.mode == 'RGB'
                np.testing.assert_array_equal(np.asarray(file), image)


def test_masks_are_kept_and_make_up_the_area(tmp_path, capsys):
    calibration_set = CalibrationSet.open(tmp_path, fingerprint={}, num_images=1, shard_size=1, classes=['cat'])
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, 3:9, 4:20] = True
    mask[0, 5, 5] = False
    label = InstanceData(bboxes=torch.tensor([[4.0, 3.0, 20.0, 9.0]]), labels=torch.tensor([0]), masks=mask)
    calibration_set.write_shard(0, np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), [label])
    calibration_set.merge()
    coco = COCO(tmp_path / 'annotations' / 'instances.json')
    (annotation,) = coco.loadAnns([1])
    np.testing.assert_array_equal(coco.annToMask(annotation), mask[0].numpy())
    assert annotation['area'] == 6 * 16 - 1


def test_the_manifest_records_the_settings_of_each_image(tmp_path):
    calibration_set = make(tmp_path, uses_real_labels=True, versions=dict(torch='2.x'))
    manifest = calibration_set.manifest
    assert manifest is not None
    assert manifest['format_version'] == 1
    assert manifest['uses_real_labels'] is True
    assert manifest['fingerprint'] == SETTINGS['fingerprint']
    assert [shard['versions'] for shard in manifest['shards']] == [dict(torch='2.x')] * 3
    assert [shard['info'] for shard in manifest['shards']] == [dict(seconds=1.5)] * 3
    digests = {image['file_name']: image['sha256'] for shard in manifest['shards'] for image in shard['images']}
    assert digests == content(tmp_path / 'images')


def test_the_same_arguments_give_the_same_bits_in_any_order_of_shards(tmp_path):
    make(tmp_path / 'forward')
    backward = CalibrationSet.open(tmp_path / 'backward', **SETTINGS)
    for index in reversed(backward.missing_shards()):
        shard = make_shard(index, backward.shard_length(index))
        backward.write_shard(index, *shard, dict(seconds=1.5))
    backward.merge()
    assert content(tmp_path / 'backward') == content(tmp_path / 'forward')


def test_a_set_of_other_settings_is_refused_and_left_alone(tmp_path):
    make(tmp_path)
    before = content(tmp_path)
    fingerprint = dict(teacher='xyz', seed=0, priors=[dict(type='BN', weight=0.2)], size=640)
    with pytest.raises(UserError) as caught:
        CalibrationSet.open(tmp_path, **{**SETTINGS, 'fingerprint': fingerprint, 'num_images': 6})
    message = str(caught.value)
    assert str(tmp_path) in message
    assert 'num_images: 5 there, 6 now' in message
    assert "teacher: 'abc' there, 'xyz' now" in message
    assert 'priors[0].weight: 0.1 there, 0.2 now' in message
    assert 'size: absent there, 640 now' in message
    assert 'seed' not in message
    assert 'zsq.calibration_set.dir to another directory' in message
    assert 'delete the directory' in message
    assert content(tmp_path) == before


@pytest.mark.parametrize('change', [dict(classes=['cat', 'dog']), dict(shard_size=3), dict(uses_real_labels=True)])
def test_no_setting_is_overlooked_even_before_the_first_shard(tmp_path, change):
    CalibrationSet.open(tmp_path, **SETTINGS)
    with pytest.raises(UserError, match='generated with other settings'):
        CalibrationSet.open(tmp_path, **{**SETTINGS, **change})


def test_a_long_difference_is_cut_short(tmp_path):
    CalibrationSet.open(tmp_path, **{**SETTINGS, 'classes': [f'a{i}' for i in range(80)]})
    with pytest.raises(UserError, match='and 60 more'):
        CalibrationSet.open(tmp_path, **{**SETTINGS, 'classes': [f'b{i}' for i in range(80)]})


def test_tuples_and_lists_are_the_same_setting(tmp_path):
    CalibrationSet.open(tmp_path, **{**SETTINGS, 'fingerprint': dict(size=(640, 640))})
    CalibrationSet.open(tmp_path, **{**SETTINGS, 'fingerprint': dict(size=[640, 640])})


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'holiday.png').write_bytes(b'precious')
    with pytest.raises(UserError, match=r'no calibration set \(images\)'):
        CalibrationSet.open(tmp_path, **SETTINGS)
    assert content(tmp_path) == {'images/holiday.png': sha256(b'precious')}
    assert [path.name for path in tmp_path.iterdir()] == ['images']


def test_a_manifest_of_another_kind_or_version_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / 'manifest.json'
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, 'format_version': 2}))
    with pytest.raises(UserError, match='has format version 2, but this version of mmzsq reads 1'):
        CalibrationSet.load(tmp_path)
    path.write_text('{"name": "my web app"}')
    with pytest.raises(UserError, match='does not belong to a calibration set'):
        CalibrationSet.open(tmp_path, **SETTINGS)
    path.write_text('{"name": "my we')
    with pytest.raises(UserError, match='is damaged'):
        CalibrationSet.load(tmp_path)


def test_only_complete_sets_are_loaded(tmp_path):
    with pytest.raises(UserError, match=r'no calibration set: generate it with .*generate\.py'):
        CalibrationSet.load(tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()
    begun = CalibrationSet.open(tmp_path / 'set', **SETTINGS)
    begun.write_shard(0, *make_shard(0, 2))
    with pytest.raises(UserError, match=r'not complete \(2 of 3 shards are missing\)'):
        CalibrationSet.load(tmp_path / 'set')
    with pytest.raises(UserError, match='not complete'):
        begun.verify()
    fill(begun)
    begun.merge()
    assert CalibrationSet.load(tmp_path / 'set').classes == ('cat', 'dog', 'bird')


def test_a_complete_set_does_not_need_its_records(tmp_path):
    make(tmp_path)
    for path in (tmp_path / 'shards').iterdir():
        path.unlink()
    (tmp_path / 'shards').rmdir()
    calibration_set = CalibrationSet.open(tmp_path, **SETTINGS)
    assert calibration_set.is_complete
    assert calibration_set.missing_shards() == []
    calibration_set.merge()
    CalibrationSet.load(tmp_path).verify()


def test_damage_is_found_named_and_healed(tmp_path):
    calibration_set = make(tmp_path)
    whole = content(tmp_path)
    changed = tmp_path / 'images' / '000002.png'
    changed.write_bytes(changed.read_bytes()[:-1] + b'!')
    (tmp_path / 'images' / '000004.png').unlink()
    annotations = tmp_path / 'annotations' / 'instances.json'
    annotations.write_text(annotations.read_text().replace('dog', 'cow'))
    with pytest.raises(UserError) as caught:
        calibration_set.verify()
    message = str(caught.value)
    assert '3 files' in message
    assert 'images/000002.png (changed)' in message
    assert 'images/000004.png (missing)' in message
    assert 'annotations/instances.json (changed)' in message
    # Do as the message says.
    changed.unlink()
    annotations.unlink()
    again = CalibrationSet.open(tmp_path, **SETTINGS)
    assert not again.is_complete
    assert again.missing_shards() == [1, 2]
    fill(again)
    again.merge()
    assert content(tmp_path) == whole
    again.verify()


def test_a_merge_restores_lost_annotations(tmp_path):
    calibration_set = make(tmp_path)
    whole = content(tmp_path)
    (tmp_path / 'annotations' / 'instances.json').unlink()
    assert not calibration_set.is_complete
    assert calibration_set.missing_shards() == []
    calibration_set.merge()
    assert content(tmp_path) == whole


def test_a_rewritten_shard_is_incomplete_until_it_is_written(tmp_path, monkeypatch):
    calibration_set = make(tmp_path)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('mmzsq.synthesis.calibration_set._encode_png', fail)
    with pytest.raises(KeyboardInterrupt):
        calibration_set.write_shard(1, *make_shard(1, 2))
    assert not calibration_set.is_complete
    assert calibration_set.missing_shards() == [1]


@pytest.mark.parametrize(
    ('images', 'labels', 'message'),
    [
        (np.zeros((2, 8, 8, 3), np.float32), make_shard(0, 2)[1], 'uint8'),
        (np.zeros((2, 3, 8, 8), np.uint8), make_shard(0, 2)[1], r'\(2, 3, 8, 8\)'),
        (np.zeros((1, 8, 8, 3), np.uint8), make_shard(0, 1)[1], 'needs 2 images, got 1'),
        (np.zeros((2, 8, 8, 3), np.uint8), make_shard(0, 1)[1], '1 labels'),
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            [InstanceData(bboxes=torch.full((1, 4), torch.nan), labels=torch.tensor([0]))] * 2,
            'must be finite',
        ),
        (
            np.zeros((2, 8, 8, 3), np.uint8),
            [InstanceData(bboxes=torch.ones(1, 4), labels=torch.tensor([3]))] * 2,
            r'labels must be in \[0, 3\)',
        ),
    ],
)
def test_a_malformed_shard_is_refused_before_anything_is_written(tmp_path, images, labels, message):
    calibration_set = CalibrationSet.open(tmp_path, **SETTINGS)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        calibration_set.write_shard(0, images, labels)
    assert content(tmp_path) == before


def test_shards_and_sets_have_bounds(tmp_path):
    calibration_set = CalibrationSet.open(tmp_path / 'set', **SETTINGS)
    with pytest.raises(IndexError, match='no shard 3: the set has 3 shards'):
        calibration_set.write_shard(3, *make_shard(0, 2))
    with pytest.raises(UserError, match='num_images=0'):
        CalibrationSet.open(tmp_path / 'none', **{**SETTINGS, 'num_images': 0})


def test_statistics_count_boxes_classes_and_areas(tmp_path):
    calibration_set = CalibrationSet.open(
        tmp_path, fingerprint={}, num_images=2, shard_size=2, classes=['cat', 'dog', 'bird']
    )
    labels = [
        InstanceData(
            bboxes=torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 10], [0, 0, 10, 30]]),
            labels=torch.tensor([0, 0, 2]),
        ),
        InstanceData(bboxes=torch.tensor([[0.0, 0, 20, 20]]), labels=torch.tensor([0])),
    ]
    calibration_set.write_shard(0, np.zeros((2, 100, 100, 3), np.uint8), labels)
    calibration_set.merge()
    statistics = calibration_set.statistics()
    assert statistics['images'] == 2
    assert statistics['boxes'] == 4
    assert statistics['boxes_per_image'] == dict(mean=2.0, min=1, max=3, histogram={'1': 1, '3': 1})
    assert statistics['classes'] == dict(cat=3, dog=0, bird=1)
    assert statistics['box_area'] == pytest.approx(dict(mean=0.025, p10=0.013, median=0.025, p90=0.037))
    json.dumps(statistics)


def _write_every_other_shard(root: Path, rank: int, barrier: Any) -> None:
    barrier.wait()
    calibration_set = CalibrationSet.open(root, **{**SETTINGS, 'num_images': 24})
    barrier.wait()
    for index in range(rank, calibration_set.num_shards, 2):
        calibration_set.write_shard(index, *make_shard(index, 2), dict(seconds=1.5))


def test_two_processes_make_the_same_set_as_one(tmp_path):
    make(tmp_path / 'one', num_images=24)
    context = multiprocessing.get_context('fork')
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_write_every_other_shard, args=(tmp_path / 'two', rank, barrier)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    merged = CalibrationSet.open(tmp_path / 'two', **{**SETTINGS, 'num_images': 24})
    assert merged.missing_shards() == []
    merged.merge()
    assert content(tmp_path / 'two') == content(tmp_path / 'one')


RECORD, IMAGE = 'shards/00001.json', 'images/000002.png'


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edit(change: Any) -> Any:
    """Change the content of a JSON file."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ('name', 'damage'),
    [
        (IMAGE, flip),
        (IMAGE, lambda path: path.write_bytes(path.read_bytes()[:-20])),
        (IMAGE, Path.unlink),
        (IMAGE, to_pipe),
        (RECORD, flip),
        (RECORD, lambda path: path.write_text('')),
        (RECORD, lambda path: path.write_text('[]')),
        (RECORD, lambda path: path.write_text('null')),
        (RECORD, lambda path: path.write_text('[' * 100_000)),
        (RECORD, to_pipe),
        (RECORD, edit(lambda record: record.pop('images'))),
        (RECORD, edit(lambda record: record['images'].pop())),
        (RECORD, edit(lambda record: record['images'][0].update(file_name='../../../etc/passwd'))),
        (RECORD, edit(lambda record: record['annotations'][0][0].update(area=-1.0))),
        (RECORD, lambda path: path.write_bytes(path.with_name('00000.json').read_bytes())),
    ],
)
def test_a_damaged_shard_of_an_unfinished_set_is_made_again(tmp_path, name, damage):
    make(tmp_path / 'whole')
    root = tmp_path / 'set'
    fill(CalibrationSet.open(root, **SETTINGS))
    damage(root / name)
    with pytest.raises(UserError, match='lacks 1 of 3 shards'):
        CalibrationSet.open(root, **SETTINGS).merge()
    again = CalibrationSet.open(root, **SETTINGS)
    assert again.missing_shards() == [1]
    fill(again)
    again.merge()
    assert content(root) == content(tmp_path / 'whole')


SETTINGS_FILE = 'shards/settings.json'


@pytest.mark.parametrize(
    ('name', 'damage'),
    [
        (SETTINGS_FILE, Path.unlink),
        (SETTINGS_FILE, lambda path: path.write_text('{')),
        (SETTINGS_FILE, edit(lambda settings: settings.pop('format_version'))),
        (SETTINGS_FILE, edit(lambda settings: settings.pop('fingerprint'))),
        (SETTINGS_FILE, edit(lambda settings: settings.update(num_images='5'))),
        (SETTINGS_FILE, edit(lambda settings: settings.update(shard_size=0))),
        ('manifest.json', lambda path: path.write_text('{"format"')),
        ('manifest.json', to_pipe),
        ('manifest.json', edit(lambda manifest: manifest.pop('fingerprint'))),
        ('manifest.json', edit(lambda manifest: manifest.pop('shards'))),
        ('manifest.json', edit(lambda manifest: manifest.update(shards=[]))),
        ('manifest.json', edit(lambda manifest: manifest['shards'].pop())),
        ('manifest.json', edit(lambda manifest: manifest['shards'][0]['images'][0].pop('sha256'))),
        ('manifest.json', edit(lambda manifest: manifest['shards'][0]['images'][0].update(file_name='../x.png'))),
        ('manifest.json', edit(lambda manifest: manifest.pop('annotations_sha256'))),
    ],
)
def test_damaged_metadata_are_written_again_and_lose_no_shard(tmp_path, name, damage):
    root = tmp_path / 'set'
    whole = make(root)
    before = content(root)
    if name == SETTINGS_FILE:
        # Without a manifest, only the records tell whose set it is.
        (root / 'manifest.json').unlink()
    damage(root / name)
    again = CalibrationSet.open(root, **SETTINGS)
    assert again.missing_shards() == []
    again.merge()
    assert content(root) == before
    whole.verify()


def test_metadata_that_nothing_vouches_for_are_refused_with_a_remedy_that_works(tmp_path):
    root = tmp_path / 'set'
    CalibrationSet.open(root, **SETTINGS).write_shard(0, *make_shard(0, 2))
    other = {**SETTINGS, 'fingerprint': dict(seed=1)}
    (root / SETTINGS_FILE).write_text('{')
    before = content(root)
    with pytest.raises(UserError, match=r'settings\.json is damaged .*: delete the directory, or set zsq.calibration'):
        CalibrationSet.open(root, **other)
    assert content(root) == before
    shutil.rmtree(root)
    make(root, **other).verify()


def test_a_damaged_manifest_is_named_when_a_set_is_read_and_the_remedy_works(tmp_path):
    make(tmp_path)
    whole = content(tmp_path)
    edit(lambda manifest: manifest['shards'].pop())(tmp_path / 'manifest.json')
    with pytest.raises(UserError, match=r"manifest\.json is damaged \('shards' .*Delete it and run") as caught:
        CalibrationSet.load(tmp_path)
    assert not isinstance(caught.value.__cause__, KeyError)
    (tmp_path / 'manifest.json').unlink()
    CalibrationSet.open(tmp_path, **SETTINGS).merge()
    assert content(tmp_path) == whole


def test_a_pipe_in_place_of_an_image_is_found_and_not_waited_for(tmp_path):
    whole = make(tmp_path)
    to_pipe(tmp_path / IMAGE)
    with pytest.raises(UserError, match=r'000002\.png \(no regular file\)'):
        whole.verify()


def test_files_that_others_left_beside_images_do_no_harm(tmp_path):
    unfinished = CalibrationSet.open(tmp_path, **SETTINGS)
    for name in ('.odd.tmp', '.tmp', '.a.b.c.tmp'):
        (tmp_path / 'images' / name).write_text('')
    fill(unfinished)
    unfinished.merge()
    unfinished.verify()
    assert (tmp_path / 'images' / '.odd.tmp').exists()


def _hold(root: Path, held: Any, end: Any) -> None:
    with CalibrationSet.open(root, **SETTINGS).lock():
        held.set()
        end.wait(60)


def test_a_second_writer_says_that_it_waits_and_a_dead_one_blocks_nobody(tmp_path):
    spawn = multiprocessing.get_context('spawn')
    held, end = spawn.Event(), spawn.Event()
    writer = spawn.Process(target=_hold, args=(tmp_path, held, end))
    writer.start()
    assert held.wait(60)
    waited: list[bool] = []

    def wait() -> None:
        waited.append(writer.is_alive())
        # The system releases the lock of a process that is killed.
        writer.kill()

    with CalibrationSet.open(tmp_path, **SETTINGS).lock(wait):
        writer.join()
    assert waited == [True]
    with CalibrationSet.open(tmp_path, **SETTINGS).lock(lambda: pytest.fail('nobody writes')):
        pass
