# SPDX-License-Identifier: Apache-2.0
"""The report of a whole run: what is measured for it, that it changes no result, and that it may fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmzsq.engine import details, report
from mmzsq.engine.details import class_accuracy, describe_values, write_details
from mmzsq.quantization.quantizers import LSQ
from mmzsq.quantization.step_search import Grid
from mmzsq.report import Run


def test_run_writes_its_report(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, 'write_details', write_details)
    runner = make_runner(**{'val_evaluator.classwise': False})
    runner.train()
    page = Path('out/report.html').read_text()
    run = Run.load('out')
    for row in run.results['metrics'].values():
        assert f'<td>{row["coco/bbox_mAP"]:.3f}' in page
    written = run.details
    # AP of classes is no metric of the run.
    assert not [name for row in run.results['metrics'].values() for name in row if name.endswith('_precision')]
    _check_scores(run.results['scores'])
    assert set() < set(written['class_ap']['float']) <= set(run.classes)
    assert written['class_ap'].keys() == {'float', 'ptq', 'zero_shot'}
    assert all(0 <= value <= 1 for row in written['class_ap'].values() for value in row.values())
    assert '| category' not in ''.join(path.read_text() for path in Path('out').glob('*/*.log'))
    assert written['set_dir'] == 'calibration_set'
    # Two epochs of two batches.
    assert written['losses']['loss']['iterations'] == [1, 2, 3, 4]
    values = runner.message_hub.log_scalars['train/loss'].data[0]
    assert written['losses']['loss']['values'] == pytest.approx(values, rel=1e-4)
    assert written['detections']['source'] == 'evaluation'
    assert len(written['detections']['images']) == 2
    layers = {layer['name']: layer for layer in written['layers']}
    assert layers.keys() == {layer.name for layer in runner.detector.report.layers}
    assert all(0 < layer[key]['error'] < 1 for layer in layers.values() for key in ('weight', 'input'))
    assert sum(written['real_labels']['counts']) == len(written['real_labels']['sizes']) > 0
    # The weights of one layer, measured here.
    name, layer = next((n, m) for n, m in runner.detector.student.named_modules() if hasattr(m, 'weight_quantizer'))
    weight = layer.filters().detach()
    error = (weight - layer.weight_quantizer(weight).detach()).norm() / weight.norm()
    assert layers[name]['weight']['error'] == pytest.approx(float(error), rel=1e-3)
    # Losses and states of the images, until the last call of each stage.
    assert {stage: curves['iteration'] for stage, curves in run.stages().items()} == {
        'relabel': [1, 2],
        'synthesize': [1],
    }
    assert [(stage, step) for stage, step, _ in run.forming()] == [('relabel', 1), ('relabel', 2), ('synthesize', 1)]
    _check_without_evaluation(runner)
    _check_failure(runner, monkeypatch)


def _check_scores(scores: dict[str, Any]) -> None:
    assert scores['source'] == 'evaluation' and scores['images'] == 2
    assert scores['rows'].keys() == {'float', 'ptq', 'zero_shot'}
    log = ''.join(path.read_text() for path in Path('out').glob('*/*.log'))
    assert 'scores of PTQ: ' in log and 'scores of the student: ' in log


def _check_without_evaluation(runner: Any) -> None:
    """Without evaluation data, teacher and student are compared on the calibration set."""
    val_loop, runner._val_loop = runner._val_loop, None
    compared = details._detections(runner, runner.detector.eval(), Path('out/report'))
    assert compared['source'] == 'calibration set' and compared['compared'] == 3
    assert compared['images'][0]['width'] == 96
    assert details._real_labels(runner) is None
    results = dict(json.loads(Path('out/results.json').read_text()), scores=None)
    write_details(runner, runner.detector, {}, results)
    scores = json.loads(Path('out/results.json').read_text())['scores']
    assert (scores['source'], scores['images'], scores['threshold']) == ('calibration set', 3, None)
    assert scores['rows'].keys() == {'float', 'zero_shot'}
    runner._val_loop = val_loop


def _check_failure(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails is left out, and a page that fails is a warning."""

    def fail(*args: Any) -> Any:
        torch.rand(1)
        raise OSError('no space left')

    monkeypatch.setattr(details, 'write_report', fail)
    monkeypatch.setattr(details, '_detections', fail)
    warnings: list[str] = []
    monkeypatch.setattr(runner.logger, 'warning', lambda text, *args, **kwargs: warnings.append(str(text)))
    random_state = torch.get_rng_state()
    write_details(runner, runner.detector, {}, dict(scores=None))
    assert warnings == [
        'the report lacks detections: OSError: no space left',
        'the report is not written: OSError: no space left',
    ]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert 'layers' in json.loads(Path('out/report/details.json').read_text())


def test_values_are_described_as_numpy_does() -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    quantizer = LSQ(bits=3, num_steps=6)
    step = torch.linspace(0.1, 0.6, 6)
    quantizer.set_grid(Grid(step, torch.zeros(6)))
    described = describe_values(quantizer, x, quantizer(x).detach())
    values, steps = x.numpy().astype(float), step.numpy().astype(float)[:, None]
    rounded = np.clip(np.round(values / steps), -4, 3) * steps
    outside = (values < -4.5 * steps) | (values > 3.5 * steps)
    assert 0 < described['clipped'] == pytest.approx(outside.mean(), rel=1e-3)
    assert described['error'] == pytest.approx(np.linalg.norm(values - rounded) / np.linalg.norm(values), rel=1e-3)
    assert described['grid'] == pytest.approx([-4 * steps.mean(), 3 * steps.mean()], rel=1e-3)
    counts, _ = np.histogram(values, 48, (described['low'], described['high']))
    assert np.abs(np.array(described['counts']) - counts).sum() <= 2


class Metric:
    """COCO's metric as far as classes matter."""

    classwise = False
    metrics = ('bbox',)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        classes = dict(cat_precision=0.25, dog_precision=float('nan')) if self.classwise else {}
        return dict(classes, bbox_mAP=0.5)


def test_class_accuracy_adds_no_metric() -> None:
    class Evaluator:
        metrics = (Metric(),)

    class Loop:
        evaluator = Evaluator()

    class Runner:
        val_loop = Loop()

        class logger:
            handlers: tuple[Any, ...] = ()

    metric, found = Evaluator.metrics[0], dict[str, float]()
    with class_accuracy(Runner(), found):  # type: ignore[arg-type]
        assert metric.compute_metrics([]) == dict(bbox_mAP=0.5)
    assert found == dict(cat=0.25)
    assert metric.compute_metrics([]) == dict(bbox_mAP=0.5) and not metric.classwise
    assert 'compute_metrics' not in vars(metric)
