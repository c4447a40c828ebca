# SPDX-License-Identifier: Apache-2.0
"""Runs with ``zsq.reconstruction``: without training, and before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmzsq.quantization import quantized_layers, quantizers

NO_EVALUATION = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
RUN = {
    'zsq.synthesis.synthesize.image_size': 96,
    'zsq.calibration_set.num_images': 4,
    'zsq.train.max_epochs': 0,
    'zsq.train.init_batches': 2,
    'zsq.reconstruction': dict(iterations=12, batch_size=1),
    **NO_EVALUATION,
}


def states(folder: str, name: str = 'ptq.pth') -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(Path(folder, name), weights_only=True)['state_dict']
    return state


def test_reconstruction_moves_weights_by_at_most_one_level(make_runner: Any) -> None:
    plain = make_runner('plain', **{**RUN, 'zsq.preset': 'instant', 'zsq.reconstruction': None})
    plain.train()
    runner = make_runner('out', **{**RUN, 'zsq.preset': 'reconstruct'})
    runner.train()
    settings = json.loads(Path('out/results.json').read_text())['settings']
    assert settings['reconstruction'] == RUN['zsq.reconstruction']
    before = dict(quantized_layers(plain.detector.student))
    moved = 0
    for name, layer in quantized_layers(runner.detector.student):
        quantizer = layer.weight_quantizer
        difference = quantizer.quantize(layer.filters()) - quantizer.quantize(before[name].filters())
        assert difference.abs().max() <= 1
        torch.testing.assert_close(quantizer.step, before[name].weight_quantizer.step)
        moved += int(difference.abs().sum())
    assert moved > 10
    steps = [
        (quantizer.step - dict(quantizers(plain.detector.student))[name].step).abs().item()
        for name, quantizer in quantizers(runner.detector.student)
        if name.endswith('input_quantizer')
    ]
    assert sum(step > 0 for step in steps) > len(steps) / 2
    log = ''.join(path.read_text() for path in Path('out').glob('*/*.log'))
    assert 'reconstruction: 1/' in log and 's left' in log


def test_reconstruction_is_the_start_of_training_and_repeats(make_runner: Any) -> None:
    trained = {**RUN, 'zsq.preset': 'default', 'zsq.calibration_set.source': 'procedural', 'zsq.train.max_epochs': 1}
    make_runner('one', **trained).train()
    make_runner('two', **trained).train()
    first, second = states('one'), states('two')
    assert all(torch.equal(second[name], value) for name, value in first.items())
    after = states('one', 'epoch_1.pth')
    weights = [name for name in first if name.endswith('conv.weight')]
    assert any(not torch.equal(after[name], first[name]) for name in weights)
    # Within a fraction of a step, as training starts from what was reconstructed.
    assert all((after[name] - first[name]).abs().max() < 0.05 for name in weights)
