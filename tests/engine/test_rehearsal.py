# SPDX-License-Identifier: Apache-2.0
"""The rehearsal: what it runs, says, estimates and leaves alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq import train
from mmzsq.config import compose
from mmzsq.config.rehearsal import rehearsal_config
from mmzsq.datasets import FirstImages
from mmzsq.engine import ZeroShotRunner
from mmzsq.engine import rehearsal as module
from mmzsq.engine.hooks.calibration_set_hook import CalibrationSetHook
from mmzsq.engine.rehearsal import rehearse
from mmzsq.errors import UserError
from mmzsq.synthesis.priors import BNStatisticsPrior, TotalVariationPrior

WHOLE = {
    # One of random weights detects hundreds of objects, whose NMS takes seconds.
    'load_from': 'mmzsq://yolov5-p_shapes.safetensors',
    'zsq.calibration_set.num_images': 100,
    'zsq.synthesis.relabel': dict(image_size=128, iterations=50, batch_size=8),
    'zsq.synthesis.refine': None,
    'zsq.synthesis.synthesize': dict(image_size=(192, 256), iterations=40, batch_size=8, start='previous'),
    'zsq.train.max_epochs': 20,
    'zsq.train.batch_size': 16,
    'zsq.quantizer.allocate': dict(budget='size'),
    # Without the search for initial steps.
    'zsq.quantizer.weight.init': 'lsq',
    'zsq.quantizer.activation.init': 'lsq',
    'zsq.quantizer.equalize': False,
    # More than the rehearsal evaluates.
    'val_dataloader.dataset.num_images': 5,
}


@pytest.mark.filterwarnings('ignore:.*instance named of:UserWarning')
def test_a_rehearsal_runs_all_stages_and_leaves_the_run_alone(make_config: Any) -> None:
    pytest.importorskip('onnx')
    of_run = [Path('out/results.json'), Path('out/calibration_set/manifest.json'), Path('out/epoch_20.pth')]
    for path in of_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('kept')
    cfg = make_config(**WHOLE)
    before = cfg.to_dict()
    made = rehearse(cfg, ZeroShotRunner.from_cfg)
    assert cfg.to_dict() == before and [path.read_text() for path in of_run] == ['kept'] * 3
    files = {path for path in Path('out').rglob('*') if path.is_file()} - set(of_run)
    assert all('out/rehearsal/' in path.as_posix() for path in files)
    assert {'results.json', 'rehearsal.json', 'ptq.pth', 'epoch_1.pth', 'student.onnx'} <= {path.name for path in files}

    checks = {check.name: check for check in made.checks}
    ran = {name for name, check in checks.items() if check.status == 'ran'}
    assert ran >= {'images', 'feature prior', 'quantizers', 'bit allocation', 'training', 'evaluation', 'export'}
    # In the proportions of the run.
    assert 'relabel 96x128 px, synthesize 160x224 px' in checks['images'].detail
    assert checks['feature prior'].detail.startswith('BNStatisticsPrior')
    assert checks['evaluation'].detail == 'float, ptq, zero_shot on 2 images'
    assert checks['training'].detail.startswith('2 steps, last losses: loss ')
    assert 'loss_0_DensePredictionLoss' in checks['training'].detail
    results = json.loads(Path('out/rehearsal/results.json').read_text())
    assert results['calibration_set']['statistics']['images'] == 4 and results['train']['iterations'] == 2
    layers = json.loads(Path('out/rehearsal/quantization_report.json').read_text())['layers']
    # Two layers were measured. All others count as insensitive.
    assert {layer['w_bits'] for layer in layers if layer['reason'].startswith('overrides')} <= {2, 8}

    relabel, synthesize, train = made.costs
    assert (relabel.image_size, synthesize.image_size, train.image_size) == ((128, 128), (192, 256), (192, 256))
    assert relabel.seconds == pytest.approx(relabel.ms_per_image_iteration * 50 * 100 / 1000)
    assert train.seconds == pytest.approx(train.ms_per_image_iteration * 20 * 100 / 1000) and train.batch_size == 16
    written = json.loads(Path('out/rehearsal/rehearsal.json').read_text())
    assert written['estimate']['num_images'] == 100 and len(written['checks']) == len(made.checks)
    [log] = Path('out/rehearsal').glob('*/*.log')
    text = log.read_text()
    assert 'bits: measuring layers: 2/2, ' in text
    measured = json.loads(Path('out/rehearsal/sensitivity.json').read_text())['layers']
    assert len(measured) == 2 and all(growth.keys() == {'2', '8'} for growth in measured.values())
    assert 'whole run: 100 images and training in about' in text and 'not part of a rehearsal' in text
    # No advice for images that mean nothing.
    assert 'image health' not in text


def test_a_second_rehearsal_replaces_the_set_of_the_first(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Path('out/rehearsal/calibration_set/manifest.json')
    kept.parent.mkdir(parents=True)
    kept.write_text('of other settings')

    def stop(cfg: Config) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rehearse(make_config(**WHOLE), stop)
    assert not kept.exists()


def test_everything_is_written_to_the_folder_of_the_rehearsal(make_config: Any) -> None:
    cfg = make_config(
        **WHOLE,
        **{'default_hooks.checkpoint.out_dir': 'elsewhere', 'val_evaluator.outfile_prefix': 'elsewhere/of_run'},
        visualizer=dict(type='DetLocalVisualizer', vis_backends=[dict(type='WandbVisBackend')]),
    )
    small = compose(rehearsal_config(cfg))
    assert 'elsewhere' not in str(small.to_dict()) and 'Wandb' not in str(small.to_dict())
    folder = str(Path(cfg.work_dir) / 'rehearsal')
    assert small.work_dir == folder and small.zsq.calibration_set.dir == f'{folder}/calibration_set'
    assert small.val_evaluator.outfile_prefix.startswith(folder)


def test_the_config_keeps_what_it_need_not_shrink(make_config: Any) -> None:
    small = rehearsal_config(make_config(**{**WHOLE, 'zsq.train.max_epochs': 0, 'zsq.train.batch_size': 1}))
    assert (small.zsq.train.max_epochs, small.zsq.train.batch_size) == (0, 1)
    assert small.zsq.quantizer.w_bits == 4 and small.zsq.quantizer.allocate.candidates == [2, 8]
    assert small.zsq.synthesis.refine is None
    small = rehearsal_config(make_config(**{'zsq.train.image_size': (640, 400), 'zsq.label_sampler.warmup': 300}))
    assert tuple(small.zsq.train.image_size) == (160, 96) and small.zsq.label_sampler.warmup == 4


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'launcher': 'pytorch'}, 'takes one process'),
        ({'zsq.calibration_set.real': dict(type='CocoDataset')}, r'remove zsq\.calibration_set\.real'),
        ({'zsq.composed': dict(digest='1')}, 'the config that was composed'),
        ({'zsq.train.max_epoch': 3}, r'zsq\.train.*max_epoch'),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(make_config: Any, options: dict[str, Any], message: str) -> None:
    cfg = make_config()
    cfg.merge_from_dict(options)
    with pytest.raises(UserError, match=message):
        compose(rehearsal_config(cfg))


def test_a_float_config_is_refused() -> None:
    with pytest.raises(UserError, match='--rehearse is for configs with a zsq section'):
        rehearsal_config(Config(dict(model=dict(type='RetinaNet'), work_dir='out')))


def test_a_rehearsal_does_not_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['train.py', 'any.py', '--rehearse', '--resume'])
    with pytest.raises(UserError, match='leave out --resume'):
        train.main()


def test_missing_feature_priors_are_named() -> None:
    of_images, of_features = TotalVariationPrior(), BNStatisticsPrior()

    def check(priors: list[Any], left_out: list[Any]) -> Any:
        synthesizer = SimpleNamespace(priors=priors)
        return module._prior_check(
            SimpleNamespace(synthesized=SimpleNamespace(synthesizer=synthesizer, priors_left_out=left_out))
        )

    assert check([of_features, of_images], []) == module.Check('feature prior', 'ran', 'BNStatisticsPrior')
    missing = check([of_images], [of_features])
    assert missing.status == 'not run' and missing.detail.endswith('do not apply to this detector: BNStatisticsPrior')
    assert module._prior_check(SimpleNamespace(synthesized=None)).status == 'not run'


def test_images_are_as_large_as_the_detector_asks_for(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(**WHOLE)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CalibrationSetHook))
    monkeypatch.setattr(module, 'accepts', lambda task, size: min(size) >= 192)
    module._choose_sizes(runner, hook, runner.cfg.zsq.synthesis)
    # Never larger than those of the run.
    for synthesis in (hook.synthesis, runner.cfg.zsq.synthesis):
        assert list(synthesis['synthesize']['image_size']) == list(synthesis['relabel']['image_size']) == [192, 256]


def test_losses_that_the_log_rounds_to_zero_are_explained() -> None:
    def check(value: float) -> Any:
        scalars = {'train/loss_0_PredictionKLLoss': SimpleNamespace(current=lambda: value)}
        return module._training_check(SimpleNamespace(max_iters=2, message_hub=SimpleNamespace(log_scalars=scalars)))

    assert 'loss_0_PredictionKLLoss 3.21e-05 (the log shows' in check(3.21e-5).detail
    assert 'normal for untrained weights' in check(-3.21e-5).detail
    assert check(0.0321).detail == '2 steps, last losses: loss_0_PredictionKLLoss 0.0321'


def test_an_evaluation_is_missing_or_failed() -> None:
    results = dict(metrics={}, not_evaluated='the evaluation data is not here', evaluation_images=0)
    assert module._evaluation_check(results, SimpleNamespace(not_evaluated=None)).status == 'not run'
    results = dict(metrics=dict(float={}), not_evaluated='ImportError: lvis', evaluation_images=9)
    assert module._evaluation_check(results, SimpleNamespace(not_evaluated='failed')).status == 'failed'


def test_a_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    image = np.zeros((8, 8, 3), np.uint8)
    labels = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    monkeypatch.setattr(module, 'load_labeled_images', lambda root, indices: ([image], [labels], []))
    monkeypatch.setattr(module, 'train_cost', full)
    hook = SimpleNamespace(root='set', num_images=1)
    source = SimpleNamespace(synthesized=None, pictures=SimpleNamespace(image_size=(16, 16)))
    zsq = SimpleNamespace(train=SimpleNamespace(max_epochs=1), calibration_set=SimpleNamespace(num_images=9))
    runner = SimpleNamespace(detector=SimpleNamespace(end_training=lambda: None))
    costs, problem = module._estimate(runner, hook, source, zsq)
    assert costs == () and problem == ('training does not fit into the memory of this GPU: lower zsq.train.batch_size')


def test_the_first_images_of_any_data_set() -> None:
    assert list(FirstImages(range(5), 2)) == [0, 1] and len(FirstImages(range(5), 2)) == 2
    assert list(FirstImages(range(1), 2, seed=3)) == [0]
