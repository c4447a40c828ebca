# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/yolo.py: the settings and order of runs, and kept results."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yolo
import yolo_methods
from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction
from PIL import Image
from torch import nn
from yolo_methods import BITS, METHODS, SETS
from yolo_tables import TABLES

from mmzsq.config.compose import complete_section, compose
from mmzsq.quantization import QuantizationConfig
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import LabelPrior

TOOL = 'benchmarks/yolo.py'
RUNS = list(yolo.runs_of(list(TABLES), [3]))


@cache
def _config(repo: Path, path: str) -> Config:
    return Config.fromfile(repo / path)


def config_of(repo: Path, command: tuple[str, ...]) -> Config:
    """The config that a command of ``tools/`` reads."""
    path, options = command[1], command[command.index('--cfg-options') + 1 :]
    cfg = copy.deepcopy(_config(repo, path))
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in (o.split('=', 1) for o in options)})
    cfg.work_dir = 'work_dirs/any'
    return cfg


def section_of(repo: Path, command: tuple[str, ...]) -> dict[str, Any]:
    return complete_section(config_of(repo, command).zsq.to_dict())


def student(repo: Path, method: str, bits: str = 'w4a4') -> dict[str, Any]:
    run = yolo.Run(method, bits, 0, ())
    with tempfile.TemporaryDirectory() as folder:
        yolo.write_configs([run], Path(folder))
        section = section_of(repo, yolo.student_command(run, Path(folder), ()))
    # Of that folder.
    section['calibration_set']['dir'] = 'any'
    return section


def without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def test_tables_are_consistent() -> None:
    assert sorted(TABLES) == [2, 4, 5, 6, 7, 8, 9, 10]
    for number, table in TABLES.items():
        for row in table.rows:
            widths = (len(row.labels), len(row.cells), len(row.paper))
            assert widths == (len(table.heads), len(table.columns), len(table.paper)), (number, row)
        for cell in (cell for row in table.rows for cell in row.cells):
            assert cell.method in METHODS and cell.bits in BITS and cell.metric in ('float', 'ptq', 'zero_shot')
        # Every table of the paper has the paper's preset and ours.
        presets = Counter(method.split('_')[0] for method, _ in table.runs)
        assert presets['default'] and (presets['paper'] or number >= 9)
    # Every run is in a table.
    assert {method for table in TABLES.values() for method, _ in table.runs} == set(METHODS)
    assert {method.images.name for method in METHODS.values() if method.images} == {images.name for images in SETS}


def test_every_student_has_its_bits_and_its_calibration_set(repo: Path, tmp_path: Path) -> None:
    yolo.write_configs(RUNS, tmp_path)
    jobs = {job.name: job for job in yolo.plan(RUNS, Path('w.pt'), tmp_path, ())}
    made = {name: section_of(repo, job.command) for name, job in jobs.items() if job.kind == yolo.SET}
    assert len(made) == len(SETS)
    for run in RUNS:
        job = jobs[run.name]
        section = section_of(repo, job.command)
        assert section['preset'] == run.method.split('_')[0]
        quantizer = QuantizationConfig(**section['quantizer'])
        assert f'w{quantizer.w_bits}a{quantizer.a_bits}' == run.bits
        assert section['calibration_set']['seed'] == 3
        if run.images is None:
            assert section['calibration_set']['real']['ann_file'] == 'annotations/instances_train2017.json'
            assert job.needs == (yolo.CONVERT,)
            continue
        [own] = set(job.needs) - {yolo.CONVERT}
        assert own == f'set_{run.images.name}_seed3'
        for key in ('calibration_set', 'label_sampler', 'synthesis'):
            assert section[key] == made[own][key]
        assert f'{jobs[own].work_dir}/calibration_set' == section['calibration_set']['dir']
    # Every composed config has a student of the published detector.
    cfg = compose(config_of(repo, jobs['default_w4a4_seed3'].command))
    assert cfg.load_from == str(yolo.TEACHER) == str(jobs[yolo.CONVERT].result)


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real labels at the path that the sets read: one box per image, with COCO's categories."""
    monkeypatch.chdir(tmp_path)
    names = DATASETS.get('CocoDataset').METAINFO['classes']
    box = dict(bbox=[10, 10, 50, 50], category_id=5, iscrowd=0)
    content = dict(
        categories=[dict(id=index, name=name) for index, name in enumerate(names)],
        images=[dict(id=index, height=100, width=100) for index in range(3)],
        annotations=[dict(box, image_id=index) for index in range(3)],
    )
    path = tmp_path / 'data/coco/annotations/instances_train2017.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


@pytest.mark.usefixtures('labels')
def test_every_set_can_be_made_as_it_is_written(repo: Path) -> None:
    tells_nothing = LabelPrior(None, None)
    task: Any = SimpleNamespace(
        detector=nn.Sequential(nn.BatchNorm2d(3)),
        num_classes=80,
        is_batched=True,
        label_prior=lambda: tells_nothing,
    )
    stages, boxes = {}, {}
    for images in SETS:
        section = section_of(repo, yolo.set_command(images, 0, yolo.WORK, ()))
        settings = section['calibration_set']
        assert settings['num_images'] == images.num_images
        generator = CalibrationSetGenerator(
            task, section['synthesis'], section['label_sampler'], settings['batch_size'], settings['seed']
        )
        stages[images.name] = [(stage.name, stage.image_size[0], stage.iterations) for stage in generator.stages]
        drawn = generator.sampler.sample(200, (160, 160), 80, torch.Generator().manual_seed(0))
        boxes[images.name] = sum(len(instances) for instances in drawn) / 200
        assert generator.sampler.uses_real_labels == images.name.endswith('real-labels')
        corrects = images.name.split('_', 1)[-1] not in (
            *('real-labels', 'noise', 'tile-out', 'tile-in', 'multi-out', 'multi-in'),
        )
        assert generator.sampler.adaptive == corrects
        assert generator.sampler.uses_detector_prior == images.name.endswith('_prior')
    assert stages['paper'] == [('relabel', 160, 800), ('synthesize', 640, 300)]
    assert stages['default'] == [('relabel', 160, 800), ('refine', 320, 300), ('synthesize', 640, 400)]
    assert stages['paper_noise'] == stages['default_noise'] == [('synthesize', 640, 0)]
    assert stages['paper_one-stage'] == [('synthesize', 640, 350)]
    assert stages['default_one-stage'] == [('synthesize', 640, 525)]
    assert stages['paper_three-stages'] == [('relabel', 160, 800), ('relabel', 160, 0), ('synthesize', 640, 300)]
    # One stage processes as many pixels as two.
    for preset in ('paper', 'default'):
        pixels = [sum(side**2 * n for _, side, n in stages[name]) for name in (preset, f'{preset}_one-stage')]
        assert pixels[0] == pixels[1]
    # With known labels, the only use of a low-resolution stage is to provide initial images, as in `default`.
    assert stages['paper_tile-in'] == [('synthesize', 640, 300)]
    assert stages['default_tile-in'] == stages['default']
    for preset in ('paper', 'default'):
        assert (
            boxes[f'{preset}_tile-in'] == pytest.approx(boxes[f'{preset}_multi-in'], rel=0.2) == pytest.approx(8, 0.2)
        )
        assert boxes[f'{preset}_noise'] == 1


def test_object_histogram_matches_the_real_images(shared: Path) -> None:
    content = json.loads((shared / 'data/coco_mini/annotations/instances_train2017.json').read_text())
    assert len(content['images']) == yolo_methods.REAL_IMAGES
    objects = Counter(item['image_id'] for item in content['annotations'] if not item['iscrowd'])
    images = Counter(objects.values())
    assert list(yolo_methods.OBJECTS_AN_IMAGE) == [images[number + 1] for number in range(max(images))]


def test_methods_of_a_preset_take_the_same_number_of_steps(repo: Path) -> None:
    for name, method in METHODS.items():
        if name == 'default_long':
            continue
        section = student(repo, name)
        images = section['calibration_set']['num_images']
        if method.images is None:
            images = section['calibration_set']['real'].get('indices', yolo_methods.REAL_IMAGES)
        train = section['train']
        steps = train['max_epochs'] * -(-images // train['batch_size'])
        wanted, batch = dict(default=(640, 16), paper=(192, 32))[section['preset']]
        assert abs(steps - wanted) <= 0.05 * wanted and train['batch_size'] == batch, name


def test_each_ablation_changes_one_part(repo: Path) -> None:
    sections = dict(quantizer={'quantizer'}, training={'train', 'distillation'}, images={'synthesis', 'label_sampler'})
    default = student(repo, 'default')
    default['calibration_set'].pop('dir')
    first, *rows = TABLES[9].rows
    assert first.cells[0].method == 'default' and len({row.cells for row in rows}) == len(rows) == 21
    for row in rows:
        method = student(repo, row.cells[0].method)
        method['calibration_set'].pop('dir')
        changed = {key for key in default if method[key] != default[key]}
        allowed = sections[row.labels[0]]
        if 'at the learning rate of weights' in row.labels[1]:
            allowed = allowed | {'train'}
            assert method['train'] == dict(default['train'], step_lr=None)
        if row.labels[1].startswith('2048'):
            allowed = {*allowed, 'calibration_set', 'train'}
            assert method['train'] == dict(default['train'], image_size=640, max_epochs=5)
        assert changed and changed <= allowed, row.labels


def test_lsq_on_real_images_uses_the_papers_quantizer_and_the_detection_loss(repo: Path) -> None:
    paper, lsq, plus = (student(repo, name) for name in ('paper', 'paper_lsq-real337', 'paper_lsq-plus-real337'))
    assert lsq['quantizer'] == paper['quantizer']
    activation = dict(paper['quantizer']['activation'], scheme='offset')
    # A quantizer of another type replaces the section. YOLOv5 has no depthwise layers to equalize.
    expected = dict(paper['quantizer'], type='mmzsq.LSQPlus', activation=activation)
    assert without(plus['quantizer'], 'equalize') == without(expected, 'equalize')
    assert lsq['distillation'] == plus['distillation'] == dict(detection_weight=1.0, losses=[])
    changed = ('quantizer', 'calibration_set', 'distillation', 'train', 'label_sampler', 'synthesis')
    assert without(lsq, *changed) == without(paper, *changed)
    assert without(lsq['train'], 'max_epochs') == without(paper['train'], 'max_epochs')


@pytest.mark.parametrize('preset', ['paper', 'default'])
def test_distillation_on_real_images_changes_the_images_only(repo: Path, preset: str) -> None:
    real, synthetic = (student(repo, name) for name in (f'{preset}_real337', preset))
    changed = ('calibration_set', 'train', 'label_sampler', 'synthesis')
    assert without(real, *changed) == without(synthetic, *changed)
    assert without(real['train'], 'max_epochs') == without(synthetic['train'], 'max_epochs')


def test_loss_ablations_only_remove_losses(repo: Path) -> None:
    def losses(name: str) -> tuple[list[str], float]:
        section = student(repo, name)
        whole = student(repo, name.split('_')[0])
        kept = section['distillation']['losses']
        assert all(loss in whole['distillation']['losses'] for loss in kept)
        # Training on labels has no augmentation.
        changed = ('distillation', 'train') if name.startswith('default') else ('distillation',)
        assert without(section, *changed) == without(whole, *changed)
        assert without(section['train'], 'augmentation') == without(whole['train'], 'augmentation')
        return [loss['type'].removeprefix('mmzsq.') for loss in kept], section['distillation']['detection_weight']

    assert losses('paper') == (['PredictionKLLoss', 'FeatureMSELoss'], 0.04)
    assert losses('paper_without-features') == (['PredictionKLLoss'], 0.04)
    assert losses('paper_detection-alone') == ([], 0.04)
    assert losses('default') == (['PredictionLoss', 'FeatureMSELoss'], 0.0)
    assert losses('default_with-detection') == (['PredictionLoss', 'FeatureMSELoss'], 0.04)
    assert losses('default_predictions-alone') == (['PredictionLoss'], 0.0)
    assert losses('default_features-alone') == (['FeatureMSELoss'], 0.0)
    assert losses('default_detection-alone') == ([], 1.0)


# Replaces every script that a job runs: records its arguments, then writes the expected files.
SCRIPT = """
import json, sys
from pathlib import Path
from PIL import Image
name, *arguments = sys.argv
if 'ultralytics' in name:
    Path(arguments[1]).parent.mkdir()
    Path(arguments[1]).write_text(arguments[0])
    sys.exit()
work_dir = Path(arguments[arguments.index('--work-dir') + 1])
with open('began.txt', 'a') as log:
    log.write(' '.join([work_dir.name, *arguments]) + '\\n')
assert Path('checkpoints/yolov5n.safetensors').is_file()
if 'generate' in name:
    (work_dir / 'calibration_set').mkdir(parents=True)
    Image.new('RGB', (len(work_dir.name), 8)).save(work_dir / 'calibration_set' / 'gallery.png')
    (work_dir / 'calibration_set' / 'manifest.json').write_text('{}')
else:
    work_dir.mkdir(parents=True)
    metrics = dict(float={'coco/bbox_mAP': 0.293}, zero_shot={'coco/bbox_mAP': 0.204})
    (work_dir / 'results.json').write_text(json.dumps(dict(config='/home/somebody/' + arguments[0], metrics=metrics)))
"""


@pytest.fixture
def root(repo: Path, tmp_path: Path) -> Path:
    """A repository with this tool, where the script above replaces all others."""
    scripts = ('tools/train.py', 'tools/generate.py', 'tools/model_converters/ultralytics_to_mmzsq.py')
    for name in (
        *scripts,
        TOOL,
        'benchmarks/jobs.py',
        'benchmarks/yolo_methods.py',
        'benchmarks/yolo_tables.py',
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(SCRIPT if name in scripts else (repo / name).read_text())
    return tmp_path


def execute(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / TOOL, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=root)


def began(root: Path) -> list[str]:
    """Names of the folders of sets and students, in the order of their start."""
    return [line.split()[0] for line in (root / 'began.txt').read_text().splitlines()]


def kept(root: Path) -> set[str]:
    return {path.stem for path in (root / 'benchmarks/results/yolov5-n').glob('*.json')}


TABLE_8 = [
    *('paper', 'paper_without-features', 'paper_detection-alone', 'default', 'default_with-detection'),
    *('default_predictions-alone', 'default_features-alone', 'default_detection-alone'),
]


def test_one_command_makes_a_table(root: Path) -> None:
    done = execute(root, '--tables', '8', '--jobs', '1', '--weights', 'published.pt')
    assert done.returncode == 0, done.stdout + done.stderr
    # Sets first; each is used by all students of its preset.
    assert began(root) == ['set_paper_seed0', 'set_default_seed0', *(f'{name}_w4a4_seed0' for name in TABLE_8)]
    assert (root / 'checkpoints/yolov5n.safetensors').read_text() == str(root / 'published.pt')
    assert kept(root) == {f'{name}_w4a4_seed0' for name in TABLE_8}
    results = json.loads((root / 'benchmarks/results/yolov5-n/default_w4a4_seed0.json').read_text())
    assert results['config'] == 'configs/zsq/yolov5-n_w4a4.py'
    with Image.open(root / 'docs/images/yolov5-n/set_paper_seed0.jpg') as gallery:
        assert gallery.format == 'JPEG' and gallery.width == len('set_paper_seed0')
    assert 'paper_w4a4_seed0: ' in done.stdout and 'box AP float 29.3, zero_shot 20.4' in done.stdout
    # Kept runs are not repeated, even on a new machine, and their sets are not made.
    (root / 'benchmarks/results/yolov5-n/default_features-alone_w4a4_seed0.json').unlink()
    subprocess.run(['rm', '-r', root / 'work_dirs'], check=True)
    before = began(root)
    done = execute(root, '--tables', '8')
    assert '7 of 8 runs are kept in benchmarks/results/yolov5-n' in done.stdout
    assert began(root)[len(before) :] == ['set_default_seed0', 'default_features-alone_w4a4_seed0']


def test_kept_results_count_with_another_output_folder(root: Path) -> None:
    (root / 'benchmarks/results/yolov5-n').mkdir(parents=True)
    (root / 'benchmarks/results/yolov5-n/default_w4a4_seed1.json').write_text('{}')
    options = ('--tables', '8', '--seeds', '1', '--methods', 'default', 'paper', '--out', str(root / 'out'))
    assert execute(root, *options).returncode == 0
    assert kept(root / 'out') == {'paper_w4a4_seed1'} and kept(root) == {'default_w4a4_seed1'}
    assert began(root) == ['set_paper_seed1', 'paper_w4a4_seed1']


def test_trials_need_their_own_folders(root: Path) -> None:
    options = ('--tables', '8', '--methods', 'default', '--cfg-options', 'zsq.train.max_epochs=1')
    refused = execute(root, *options)
    assert refused.returncode == 2 and 'give --out and --work-dir' in refused.stderr
    done = execute(root, *options, '--out', 'trial', '--work-dir', 'work_dirs/trial')
    assert done.returncode == 0, done.stdout + done.stderr
    assert kept(root / 'trial') == {'default_w4a4_seed0'} and not kept(root)
    lines = (root / 'began.txt').read_text().splitlines()
    # After those of the table: the last one counts.
    assert all(line.endswith('zsq.train.max_epochs=1') for line in lines)


def test_the_list_names_every_run_with_its_tables_and_commands(root: Path) -> None:
    (root / 'benchmarks/results/yolov5-n').mkdir(parents=True)
    (root / 'benchmarks/results/yolov5-n/default_w6a6_seed0.json').write_text('{}')
    done = execute(root, '--tables', '6', '--seeds', '0', '1', '--presets', 'default', '--list')
    assert not (root / 'began.txt').exists()
    lines = done.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(' ')]
    assert len(heads) == 2 * 9 + 1 and heads[-1] == '18 runs, 17 missing'
    assert 'default_w6a6_seed0: table 2 4 5 6 7 10, kept' in heads
    start = lines.index('default_three-stages_w4a4_seed1: table 6, missing')
    generate, train = (line.split()[1:3] for line in lines[start + 1 : start + 3])
    assert generate == ['tools/generate.py', 'configs/zsq/comparison/yolov5-n_three-stages.py']
    assert train == ['tools/train.py', 'configs/zsq/comparison/yolov5-n_three-stages.py']


def test_runs_are_ordered_by_seed_then_table() -> None:
    runs = list(yolo.runs_of([8, 6], [1, 0], bits=['w4a4', 'w5a5']))
    assert [run.seed for run in runs] == sorted((run.seed for run in runs), reverse=True)
    names = _names(run for run in runs if run.seed == 1)
    assert names[:8] == [f'{name}_w4a4_seed1' for name in TABLE_8]
    # Both tables show it; it runs once.
    assert len(names) == len(set(names)) == 8 + 12 - 2


def _names(runs: Iterable[yolo.Run]) -> list[str]:
    return [run.name for run in runs]


def test_allocated_bits_are_passed_by_a_generated_config(root: Path, repo: Path) -> None:
    for name in ('configs/zsq/yolov5-n_w4a4.py', 'benchmarks/results/yolov5-n_bits.json'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((repo / name).read_text() if name.endswith('.json') else 'zsq = dict(quantizer={})')
    done = execute(root, '--tables', '10', '--methods', 'default_mixed-size', '--bits', 'w4a4')
    assert done.returncode == 0, done.stdout + done.stderr
    overrides = Config.fromfile(root / 'work_dirs/yolov5-n/configs/yolov5-n_mixed-size_w4a4.py').zsq.quantizer.overrides
    assert overrides['backbone.stage2.0.conv'] == dict(w_bits=5, a_bits=4)
    results = json.loads((root / 'benchmarks/results/yolov5-n/default_mixed-size_w4a4_seed0.json').read_text())
    assert results['config'] == 'configs/zsq/yolov5-n_w4a4.py'
