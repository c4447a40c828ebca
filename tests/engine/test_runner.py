# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny detector from config to results: files written, data read, and resuming."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS

from mmzsq import test as test_tool
from mmzsq.config.compose import compose, merge
from mmzsq.engine import FiniteLossHook, ZeroShotRunner, bit_allocation
from mmzsq.errors import UserError
from mmzsq.qat.captured_step import CapturedStep
from mmzsq.quantization import quantizers
from mmzsq.synthesis import CalibrationSet


@METRICS.register_module(force=True)
class PredictionsMetric(BaseMetric):
    """Reports the predictions as numbers that differ between detectors. COCO's AP of random weights is 0."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        for sample in data_samples:
            found = sample['pred_instances']
            self.results.append((float(found['scores'].double().sum()), float(found['bboxes'].double().sum())))

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        scores, bboxes = np.array(results).sum(0)
        return dict(scores=float(scores), bboxes=float(bboxes))


METRIC = {f'{name}_evaluator': dict(_delete_=True, type='PredictionsMetric', prefix='sum') for name in ('val', 'test')}
NO_EVALUATION = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}


def run(make_runner: Any, work_dir: str = 'out', **options: Any) -> ZeroShotRunner:
    runner = make_runner(work_dir, **{**METRIC, **options})
    runner.train()
    return runner


def results(work_dir: str) -> dict[str, Any]:
    return json.loads(Path(work_dir, 'results.json').read_text())


def last(work_dir: str) -> dict[str, Any]:
    return torch.load(Path(work_dir, 'last_checkpoint').read_text(), map_location='cpu', weights_only=True)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def set_bits(work_dir: str) -> dict[str, str]:
    """Digests of images and annotations of a complete set."""
    root = CalibrationSet.load(Path(work_dir, 'calibration_set')).root
    files = [*root.glob('images/*.png'), root / 'annotations/instances.json']
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_writes_set_results_gallery_and_a_self_contained_checkpoint(
    make_runner: Any, make_config: Any, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / 'copy.pth'
    copy.write_bytes(teacher.read_bytes())
    released: list[Any] = []
    monkeypatch.setattr(CapturedStep, 'release', lambda step: released.append(step))
    runner = run(make_runner, load_from=str(copy))
    # A remaining graph would keep several processes from ending.
    assert released == [runner.detector._captured_step]

    written = results('out')
    assert list(written['metrics']) == ['float', 'ptq', 'zero_shot']
    values = [tuple(row.values()) for row in written['metrics'].values()]
    assert len(set(values)) == 3
    assert written['preset'] == 'default'
    assert (written['quantizer']['w_bits'], written['quantizer']['a_bits']) == (4, 4)
    assert written['model_mb']['quantized'] < written['model_mb']['float'] / 4
    assert written['bit_operations']['quantized'] < written['bit_operations']['float'] / 10
    assert written['bit_operations']['image_size'] == [64, 64]
    # Two epochs of three images in batches of two.
    assert (written['train']['iterations'], written['train']['images']) == (4, 8)
    assert set(written['seconds']) == {'train', 'evaluate_float', 'evaluate_ptq', 'evaluate_zero_shot'}
    assert written['settings']['synthesis']['relabel']['iterations'] == 2
    assert written['settings']['train']['max_epochs'] == 2
    assert {'mmzsq', 'torch', 'torchvision', 'mmengine', 'mmdet', 'python'} == set(written['versions'])
    made = written['calibration_set']
    assert made['statistics']['images'] == 3
    assert made['stages']['relabel']['image_iterations'] == 6
    assert made['stages']['relabel']['added'] > 0
    assert made['stages']['synthesize']['added'] == 0

    gallery = cv2.imread('out/calibration_set/gallery.png')
    # Tiles of 256 pixels side by side.
    assert gallery.shape == (256, 3 * 260 - 4, 3)
    assert len(list(Path('out/calibration_set/previews').glob('*.png'))) == 2 * 2

    checkpoint = last('out')
    assert set(checkpoint['state_dict']) == set(runner.detector.state_dict())
    assert not any('teacher' in name for name in checkpoint['state_dict'])
    assert checkpoint['meta']['mmzsq']['teacher'] == str(copy)
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert checkpoint['meta']['mmzsq']['teacher_sha256'] == written['teacher_sha256'] == digest
    assert json.loads(Path('out/calibration_set/manifest.json').read_text())['teacher_sha256'] == digest
    floats = torch.load(copy, weights_only=True)['state_dict']
    assert checkpoint['state_dict'].keys() > floats.keys()
    # The optimizer has moments of the student only.
    shapes = {tuple(value.shape) for value in runner.detector.parameters()}
    moments = checkpoint['optimizer']['state'].values()
    assert {tuple(state['exp_avg'].shape) for state in moments} <= shapes

    # tools/test.py needs only config and checkpoint.
    copy.unlink()
    cfg = make_config('tested', **METRIC, load_from='gone.pth')
    cfg.dump('config.py')
    file = Path('out/last_checkpoint').read_text()
    monkeypatch.setattr('sys.argv', ['test.py', 'config.py', file, '--work-dir', 'tested'])
    test_tool.main()
    [tested] = Path('tested').rglob('*.json')
    assert json.loads(tested.read_text().splitlines()[-1]).items() >= written['metrics']['zero_shot'].items()


def test_a_float_checkpoint_is_not_accepted_as_a_quantized_one(make_runner: Any) -> None:
    # load_from is the teacher: a float checkpoint.
    with pytest.raises(UserError, match='holds no quantizer steps'):
        make_runner('out', **METRIC).test()


@pytest.mark.parametrize(
    ('quantizer', 'message'),
    [
        ({}, None),
        (dict(scope=None, skip=[], weight=dict(init='lsq'), grad_scale=False), None),
        (dict(w_bits=8), 'w_bits 8, not 4'),
        (dict(activation=dict(scheme='signed')), "activation.scheme 'signed', not 'offset'"),
        (dict(overrides={'neck': 8}), r"overrides \{'neck': Bits\(w_bits=8, a_bits=8\)\}, not \{\}"),
    ],
)
def test_a_checkpoint_of_other_bits_is_refused(
    make_runner: Any, tmp_path: Path, quantizer: dict[str, Any], message: str | None
) -> None:
    """Its tensors have the shapes of the config, so no other check would find the difference."""
    runner = make_runner('out')
    trained = json.loads(json.dumps(merge(runner.detector.quantizer_cfg, quantizer)))
    state = runner.detector.state_dict()
    torch.save(dict(meta=dict(mmzsq=dict(quantizer=trained)), state_dict=state), tmp_path / 'trained.pth')
    if message is None:
        runner.load_checkpoint(str(tmp_path / 'trained.pth'))
        return
    with pytest.raises(UserError, match=f'other settings of zsq.quantizer: {message}. Give the config that it was'):
        runner.load_checkpoint(str(tmp_path / 'trained.pth'))


@pytest.mark.parametrize('in_meta', [True, False], ids=['', 'without settings'])
@pytest.mark.parametrize(('equalize', 'factors'), [(True, 'input_scale'), ('learned', 'log_input_scale')])
def test_a_checkpoint_with_other_equalized_layers_is_refused(
    make_runner: Any, tmp_path: Path, equalize: bool | str, factors: str, in_meta: bool
) -> None:
    """Its weights contain factors that the model would drop, or lack those of the model."""
    runner = make_runner('out', **{'zsq.quantizer.equalize': equalize})
    quantizer = json.loads(json.dumps(runner.detector.quantizer_cfg))
    meta = dict(mmzsq=dict(quantizer=quantizer)) if in_meta else {}

    def load(change: Callable[[dict[str, Any], str], object]) -> None:
        state = runner.detector.state_dict()
        change(state, f'neck.top_down_fine.final_conv.conv.{factors}')
        torch.save(dict(meta=meta, state_dict=state), tmp_path / 'trained.pth')
        runner.load_checkpoint(str(tmp_path / 'trained.pth'))

    load(lambda state, name: state[name])
    for change in (
        lambda state, name: state.pop(name),
        lambda state, name: state.update({name.replace('neck.', 'neck.other.'): state[name]}),
    ):
        with pytest.raises(
            UserError, match=r'other layers than the model .*such as neck\.(other\.)?top_down_fine\.fin'
        ):
            load(change)


ALLOCATE = {
    'zsq.quantizer.allocate': dict(budget='size', candidates=[3, 4, 8], batches=1),
    # Skips the search for the first steps, which is not tested here.
    'zsq.quantizer.weight.init': 'lsq',
    'zsq.quantizer.activation.init': 'lsq',
}


def test_allocated_bits_keep_the_size_and_every_command_reads_them(
    make_runner: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(work_dir: str) -> tuple[list[tuple[int, int]], float]:
        report = json.loads(Path(work_dir, 'quantization_report.json').read_text())
        return [(layer['w_bits'], layer['a_bits']) for layer in report['layers']], report['model']['size_after_mb']

    plain = run(make_runner, 'plain', **NO_EVALUATION)
    HOOKS.register_module(module=Interrupt, force=True)
    interrupted = make_config('out', **METRIC, **ALLOCATE)
    interrupted.custom_hooks = [*(interrupted.get('custom_hooks') or []), dict(type='Interrupt')]
    with pytest.raises(KeyboardInterrupt):
        ZeroShotRunner.from_cfg(interrupted).train()
    (bits, size), (same_bits, same_size) = sizes('out'), sizes('plain')
    # First and last layers have 8.
    free = [index for index, of in enumerate(same_bits) if of == (4, 4)]
    assert len({bits[index] for index in free}) > 1 and {bits[index][0] for index in free} <= {3, 4, 8}
    assert all(bits[index][1] == 4 for index in free) and size <= same_size
    assert plain.detector.quantizer_cfg.get('overrides', {}) == {}

    def measured(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('measured again')

    # A resumed run, and an evaluation with the same config, use the same bits.
    monkeypatch.setattr(bit_allocation, 'measure_sensitivity', measured)
    cfg = make_config('out', **METRIC, **ALLOCATE)
    cfg.resume, cfg.load_from = True, None
    runner = ZeroShotRunner.from_cfg(cfg)
    runner.train()
    trained = {name: (q.bits, q.qmax) for name, q in quantizers(runner.detector.student)}
    assert [(layer.w_bits, layer.a_bits) for layer in runner.detector.report.layers] == bits
    tested = make_runner('tested', **METRIC, **{**ALLOCATE, 'load_from': Path('out/last_checkpoint').read_text()})
    metrics = tested.test()
    assert {name: (q.bits, q.qmax) for name, q in quantizers(tested.detector.student)} == trained
    assert metrics.items() >= results('out')['metrics']['zero_shot'].items()
    # A config with the bits of the checkpoint is accepted, too; one without them is refused.
    quantizer = last('out')['meta']['mmzsq']['quantizer']
    assert set(quantizer['overrides']) == {runner.detector.report.layers[index].name for index in free}
    with pytest.raises(UserError, match='other settings of zsq.quantizer: overrides'):
        make_runner('other', **METRIC, load_from=Path('out/last_checkpoint').read_text()).test()
    # The initial student is evaluated with them as well.
    ptq = make_runner('ptq', **METRIC, **{**ALLOCATE, 'load_from': 'out/ptq.pth'})
    assert ptq.test() == pytest.approx(results('out')['metrics']['ptq'], rel=1e-12)
    assert {name: (q.bits, q.qmax) for name, q in quantizers(ptq.detector.student)} == trained


def test_a_checkpoint_provides_bits_of_layers_but_no_patterns(make_runner: Any, tmp_path: Path) -> None:
    """A pattern would change the settings but not the layers that it selects."""
    runner = make_runner('out', **ALLOCATE)
    trained = json.loads(json.dumps(merge(runner.detector.quantizer_cfg, dict(overrides={'neck': 8}))))
    state = runner.detector.state_dict()
    torch.save(dict(meta=dict(mmzsq=dict(quantizer=trained)), state_dict=state), tmp_path / 'trained.pth')
    with pytest.raises(UserError, match=r"overrides \{'neck': Bits\(w_bits=8, a_bits=8\)\}, not \{\}"):
        runner.load_checkpoint(str(tmp_path / 'trained.pth'))


def coco(folder: Path, color: int) -> dict[str, Any]:
    """Options for an evaluation on images on disk; without ``color`` there are no images."""
    classes = [f'c{index}' for index in range(8)]
    if color is not None:
        folder.mkdir()
        images, annotations = [], []
        for index in range(2):
            pixels = np.random.default_rng(color + index).integers(0, 256, (64, 64, 3), np.uint8)
            cv2.imwrite(str(folder / f'{index}.png'), pixels)
            images.append(dict(id=index, file_name=f'{index}.png', width=64, height=64))
            box = dict(bbox=[4 + color, 4, 30, 30], area=900, iscrowd=0, category_id=1 + color)
            annotations.append(dict(id=index + 1, image_id=index, **box))
        categories = [dict(id=index, name=name) for index, name in enumerate(classes)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / 'annotations.json').write_text(json.dumps(content))
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='annotations.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=classes),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    )
    loader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    evaluator = dict(type='CocoMetric', metric='bbox', ann_file=str(folder / 'annotations.json'))
    return {
        **{f'{name}_dataloader': dict(_delete_=True, **loader) for name in ('val', 'test')},
        **{f'{name}_evaluator': dict(_delete_=True, **evaluator) for name in ('val', 'test')},
    }


@pytest.fixture
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the warnings of runners."""
    collected: list[str] = []
    warning = logging.Logger.warning
    monkeypatch.setattr(
        logging.Logger, 'warning', lambda self, text, *args: [collected.append(text), warning(self, text, *args)]
    )
    return collected


def test_real_data_is_not_needed_and_changes_no_bit(
    make_runner: Any, tmp_path: Path, warnings_of: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = cv2.imdecode
    run(make_runner, 'missing', **coco(tmp_path / 'nowhere', None))
    assert any('accuracy is not measured' in text and 'nowhere' in text for text in warnings_of)
    assert results('missing')['metrics'] == {}
    assert 'nowhere' in results('missing')['not_evaluated']

    # Existing images are read after the last checkpoint is written. Annotations are checked before.
    def imdecode(*args: Any) -> Any:
        opened.append('' if Path('present/last_checkpoint').exists() else 'early')
        return read(*args)

    options = coco(tmp_path / 'one', 0)
    build = ZeroShotRunner.build_dataloader

    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        loader = build(dataloader, *args, **kwargs)
        if 'one' in str(getattr(loader.dataset, 'data_root', '')):
            opened.append('' if Path('present/epoch_2.pth').exists() else 'early')
        return loader

    monkeypatch.setattr(ZeroShotRunner, 'build_dataloader', staticmethod(build_dataloader))
    run(make_runner, 'present', **options)
    assert opened
    assert 'early' not in opened
    assert set(results('present')['metrics']) == {'float', 'ptq', 'zero_shot'}

    run(make_runner, 'other', **coco(tmp_path / 'two', 3))
    for work_dir in ('present', 'other'):
        assert set_bits(work_dir) == set_bits('missing')
        assert same(last(work_dir)['state_dict'], last('missing')['state_dict'])


def test_an_image_size_that_the_neck_rejects_is_refused_before_synthesis(make_runner: Any) -> None:
    runner = make_runner('out', **NO_EVALUATION, **{'zsq.synthesis.synthesize.image_size': 100})
    with pytest.raises(UserError, match='does not accept images of 100x100 pixels'):
        runner.generate()
    assert not list(Path('out').glob('calibration_set/images/*'))


class Interrupt(Hook):
    """Ends a run after an epoch, like Ctrl-C."""

    priority = 'LOWEST'

    def after_train_epoch(self, runner: Any) -> None:
        raise KeyboardInterrupt


def test_a_resumed_run_continues_without_calibrating_again(
    make_runner: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make_runner, 'whole', **NO_EVALUATION)
    HOOKS.register_module(module=Interrupt, force=True)
    interrupted = make_config('out', **NO_EVALUATION)
    interrupted.custom_hooks = [*(interrupted.get('custom_hooks') or []), dict(type='Interrupt')]
    with pytest.raises(KeyboardInterrupt):
        ZeroShotRunner.from_cfg(interrupted).train()
    checkpoint = last('out')
    assert checkpoint['meta']['epoch'] == 1

    # As MMDetection's tools/train.py --resume sets it: the checkpoint names the teacher.
    cfg = make_config('out', **NO_EVALUATION)
    cfg.resume, cfg.load_from = True, None
    runner = ZeroShotRunner.from_cfg(cfg)
    assert runner.detector.teacher_checkpoint == checkpoint['meta']['mmzsq']['teacher']
    seen: dict[str, Any] = {}

    class Look(Hook):
        """Records the iteration at which training begins."""

        priority = 'LOWEST'

        def before_train(self, runner: Any) -> None:
            seen['state'] = {name: value.clone() for name, value in runner.detector.state_dict().items()}
            seen['at'] = (runner.iter, runner.epoch)
            seen['moments'] = len(runner.optim_wrapper.optimizer.state)

    runner.register_hook(Look())
    ptq = Path('out/ptq.pth')
    written = ptq.stat().st_mtime_ns
    runner.train()
    assert seen['at'] == (2, 1)
    assert seen['moments'] > 0
    assert same(seen['state'], checkpoint['state_dict'])
    assert ptq.stat().st_mtime_ns == written
    assert runner.iter == whole.iter == 4
    assert last('out')['meta']['iter'] == 4
    assert set_bits('out') == set_bits('whole')
    assert results('out')['metrics'] == {}
    # The time per image counts the images of this process only.
    train = results('out')['train']
    assert (train['iterations'], train['images'], train['first_iteration']) == (4, 8, 2)
    assert train['ms_per_image'] == pytest.approx(1000 * results('out')['seconds']['train'] / 4, abs=0.001)
    assert results('whole')['train']['first_iteration'] == 0


def test_a_checkpoint_that_lacks_weights_is_not_resumed(make_runner: Any, make_config: Any) -> None:
    run(make_runner, 'out', **NO_EVALUATION)
    whole = last('out')

    def resume(checkpoint: dict[str, Any]) -> None:
        torch.save(checkpoint, 'changed.pth')
        cfg = make_config('out', **NO_EVALUATION)
        cfg.resume, cfg.load_from = True, 'changed.pth'
        ZeroShotRunner.from_cfg(cfg).train()

    def without_head(state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if 'bbox_head.convs.0.weight' not in name}

    with pytest.raises(UserError, match=r'changed\.pth .* missing \(bbox_head\.convs\.0\.weight'):
        resume(dict(whole, state_dict=without_head(whole['state_dict'])))
    averages = {f'module.{name}': value for name, value in whole['state_dict'].items()}
    with pytest.raises(UserError, match=r'ema_state_dict of changed\.pth .*bbox_head\.convs\.0\.weight'):
        resume(dict(whole, ema_state_dict=dict(without_head(averages), steps=torch.tensor(1))))


def test_resume_without_a_checkpoint_starts_from_the_teacher(make_config: Any, teacher: Path) -> None:
    cfg = make_config('out')
    cfg.resume, cfg.load_from, cfg.zsq.teacher = True, None, str(teacher)
    # The work_dir is empty, then it holds the files of the float detector's training.
    for _ in range(2):
        runner = ZeroShotRunner.from_cfg(cfg)
        assert runner.detector.teacher_checkpoint == str(teacher)
        assert not runner._resume
        Path('out/last_checkpoint').write_text(str(teacher))
    cfg.zsq.teacher = None
    with pytest.raises(UserError, match='no run to resume in .*, and no teacher to start one from: set zsq.teacher'):
        ZeroShotRunner.from_cfg(cfg)


@pytest.mark.parametrize('composed', [False, True])
def test_a_resumed_run_gets_its_teacher_from_the_section_or_the_checkpoint(
    make_config: Any, teacher: Path, composed: bool
) -> None:
    cfg = make_config('out')
    cfg = compose(cfg) if composed else cfg
    cfg.resume = True
    Path('out').mkdir()
    for epoch in (1, 2):
        meta = dict(epoch=epoch, iter=2 * epoch, mmzsq=dict(teacher=str(teacher)))
        checkpoint = dict(torch.load(teacher, weights_only=True), meta=meta, message_hub={})
        torch.save(checkpoint, f'out/epoch_{epoch}.pth')
    Path('out/last_checkpoint').write_text('out/epoch_2.pth')
    for given, resumed in ((None, 'out/epoch_2.pth'), ('out/epoch_1.pth', 'out/epoch_1.pth')):
        cfg.load_from = given
        runner = ZeroShotRunner.from_cfg(cfg)
        assert (runner._resume, runner._load_from) == (True, resumed)
        assert runner.detector.teacher_checkpoint == str(teacher)
    if not composed:
        cfg.zsq.teacher = 'moved/teacher.pth'
        assert ZeroShotRunner.from_cfg(cfg).detector.teacher_checkpoint == 'moved/teacher.pth'


def test_load_from_is_never_the_teacher_with_resume(make_config: Any, teacher: Path) -> None:
    cfg = make_config('out')
    cfg.resume = True
    with pytest.raises(UserError, match=f'{teacher} is not the checkpoint of a quantization run. Name .* zsq.teacher'):
        ZeroShotRunner.from_cfg(cfg)
    cfg.load_from = 'nowhere.pth'
    with pytest.raises(UserError, match='nowhere.pth'):
        ZeroShotRunner.from_cfg(cfg)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(lr=1e-3, mometum=0.9), 'zsq.train.optimizer cannot be built: .*mometum'),
        (dict(lr=1e-3, betas=3), 'zsq.train.optimizer cannot be built'),
    ],
)
def test_an_invalid_optimizer_is_refused_before_synthesis(
    make_config: Any, settings: dict[str, Any], message: str
) -> None:
    cfg = make_config('out')
    cfg.merge_from_dict({'zsq.train.optimizer': settings})
    with pytest.raises(UserError, match=message):
        ZeroShotRunner.from_cfg(cfg).train()
    assert not Path('out/calibration_set').exists()


def test_a_run_killed_during_synthesis_continues_to_the_same_set(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_runner('whole').generate()
    write_shard = CalibrationSet.write_shard
    written: list[int] = []

    def killed(self: CalibrationSet, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write_shard(self, index, *args)

    monkeypatch.setattr(CalibrationSet, 'write_shard', killed)
    with pytest.raises(KeyboardInterrupt):
        make_runner('out').generate()
    with pytest.raises(UserError, match='not complete'):
        CalibrationSet.load('out/calibration_set')

    def counted(self: CalibrationSet, index: int, *args: Any) -> None:
        written.append(index)
        write_shard(self, index, *args)

    monkeypatch.setattr(CalibrationSet, 'write_shard', counted)
    make_runner('out').generate()
    assert written == [1]
    assert set_bits('out') == set_bits('whole')
    make_runner('out').generate()
    assert written == [1]


def test_the_log_names_the_terms_of_synthesis(make_runner: Any) -> None:
    make_runner('out').generate()
    balance = dict(balance=True, detection_weight=0.5, detection_interval=3)
    make_runner('other', **{f'zsq.synthesis.{key}': value for key, value in balance.items()}).generate()
    first, second = (next(Path(work_dir).rglob('*.log')).read_text() for work_dir in ('out', 'other'))
    assert 'detection loss: 1 x the sum over the images of a batch; priors: BNStatisticsPrior,' in first
    assert 'detection loss: 0.5 x the gradient of the feature priors, renewed every 3 steps; priors' in second


def test_a_set_of_another_teacher_or_other_settings_is_refused(make_runner: Any, teacher: Path, tmp_path: Path) -> None:
    make_runner('out').generate()
    before = set_bits('out')
    with pytest.raises(UserError, match='iterations'):
        make_runner('out', **{'zsq.synthesis.synthesize.iterations': 2}).generate()
    other = torch.load(teacher, weights_only=True)
    next(iter(other['state_dict'].values())).add_(1e-3)
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(UserError, match='teacher'):
        make_runner('out', load_from=str(tmp_path / 'other.pth')).generate()
    assert set_bits('out') == before


def test_a_non_finite_loss_ends_the_run_and_keeps_its_checkpoints(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner('out', **NO_EVALUATION)
    loss = runner.detector.loss
    steps = 0

    def diverging(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        losses = loss(*args)
        return {name: term * (math.nan if steps > 2 else 1) for name, term in losses.items()}

    monkeypatch.setattr(runner.detector, 'loss', diverging)
    with pytest.raises(UserError, match=r'the loss is nan at iteration \d+: lower zsq.train.optimizer.lr'):
        runner.train()
    assert [path.name for path in Path('out').glob('epoch_*.pth')] == ['epoch_1.pth']
    assert all(torch.isfinite(value).all() for value in last('out')['state_dict'].values())


def test_the_loss_is_checked_at_intervals_only(make_runner: Any) -> None:
    class Loop:
        train_dataloader = range(100)
        iter = 0
        hooks = ()

    hook, loop, nan = FiniteLossHook(interval=50), Loop(), torch.tensor(float('nan'))
    looked = []
    for batch in range(100):
        loop.iter = batch
        try:
            hook.after_train_iter(loop, batch, outputs=dict(loss=nan))
        except UserError:
            looked.append(batch)
        hook.after_train_iter(loop, batch, outputs=dict(loss=torch.tensor(1.0)))
        hook.after_train_iter(loop, batch, outputs=None)
    assert looked == [49, 99]


def test_no_checkpoint_is_written_after_a_non_finite_loss(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its interval, here every two iterations."""
    checkpoint = {'default_hooks.checkpoint': dict(type='CheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=1)}
    runner = make_runner('out', **NO_EVALUATION, **checkpoint, **{'zsq.train.max_epochs': 3})
    loss, steps = runner.detector.loss, 0

    def diverging(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        return {name: term * (math.nan if steps > 2 else 1) for name, term in loss(*args).items()}

    monkeypatch.setattr(runner.detector, 'loss', diverging)
    monkeypatch.setattr(FiniteLossHook, 'end_of_epoch', lambda *_: False)
    with pytest.raises(UserError, match='the loss is nan at iteration 3'):
        runner.train()
    assert all(torch.isfinite(value).all() for value in last('out')['state_dict'].values())


def test_the_paper_preset_runs_and_its_average_is_saved(make_runner: Any, make_config: Any) -> None:
    options = {'zsq.preset': 'paper', 'zsq.train.ema': 0.9, 'zsq.train.max_epochs': 2, 'zsq.train.optimizer.lr': 1e-2}
    runner = run(make_runner, 'out', **options)
    written = results('out')
    assert written['preset'] == 'paper'
    assert written['quantizer']['step'] == 'linear'
    assert set(written['metrics']) == {'float', 'ptq', 'zero_shot'}
    checkpoint = last('out')
    averages, trained = checkpoint['state_dict'], checkpoint['ema_state_dict']
    assert {f'module.{name}' for name in averages} == set(trained) - {'steps'}
    own = runner.detector.state_dict()
    name = next(name for name in own if name.endswith('conv.weight'))
    # The saved weights are the average, which lags behind the trained weights.
    assert torch.equal(trained[f'module.{name}'], own[name])
    assert not torch.equal(averages[name], own[name])
    assert all(quantizer.ready for _, quantizer in quantizers(runner.detector.student))

    cfg = make_config('tested', **METRIC, **options)
    cfg.load_from = Path('out/last_checkpoint').read_text()
    assert ZeroShotRunner.from_cfg(cfg).test() == pytest.approx(written['metrics']['zero_shot'], rel=1e-12)


def test_a_run_keeps_its_composed_config(make_runner: Any) -> None:
    runner = make_runner('out')
    runner.generate()
    assert runner.cfg.zsq.composed
    [dumped] = Path('out').glob('*.py')
    kept = Config.fromfile(dumped)
    assert kept.zsq.composed
    assert compose(kept).to_dict() == kept.to_dict()
    kept.zsq.quantizer.w_bits = 6
    with pytest.raises(UserError, match='yolov5-p_shapes_w4a4.py'):
        ZeroShotRunner.from_cfg(kept)
    assert MODELS.get('mmzsq.ZeroShotDetector') is type(runner.detector)


def test_a_composed_config_keeps_its_teacher(make_config: Any, teacher: Path) -> None:
    cfg = compose(make_config('out'))
    cfg.load_from = 'other.pth'
    runner = ZeroShotRunner.from_cfg(cfg)
    for job in (runner.generate, runner.train):
        with pytest.raises(UserError, match=f'load_from is other.pth, .* with the teacher {teacher}'):
            job()
    assert not Path('out/calibration_set').exists()


def test_workers_end_with_the_training(make_runner: Any) -> None:
    """The runner still exists, and with it the data loader."""
    none = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
    runner = make_runner(**none, **{'zsq.train.num_workers': 1})
    workers: list[int] = []
    step = runner.detector.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        workers.append(len(multiprocessing.active_children()))
        return step(*args, **kwargs)

    runner.detector.train_step = train_step
    runner.train()
    assert set(workers) == {1}
    assert not multiprocessing.active_children()
