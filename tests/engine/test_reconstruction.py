# SPDX-License-Identifier: Apache-2.0
"""A run with ``zsq.reconstruction``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from mmzsq.engine import QuantizerInitHook
from mmzsq.quantization import quantized_layers, quantizers

NO_EVALUATION = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
RUN = {
    'zsq.preset': 'reconstruct',
    'zsq.synthesis.synthesize.image_size': 96,
    'zsq.calibration_set.num_images': 4,
    'zsq.train.init_batches': 2,
    'zsq.reconstruction': dict(iterations=12, batch_size=1),
    **NO_EVALUATION,
}


def test_a_run_reconstructs_before_the_snapshot_and_repeats(make_runner: Any, monkeypatch: Any) -> None:
    reconstruct = QuantizerInitHook._reconstruct
    seen: dict[str, Any] = {}

    def twice(self: Any, runner: Any, *args: Any) -> None:
        detector = runner.detector
        seen['before'] = copy.deepcopy(detector.student)
        start = copy.deepcopy(detector.state_dict())
        reconstruct(self, runner, *args)
        seen['first'] = copy.deepcopy(detector.state_dict())
        detector.load_state_dict(start)
        reconstruct(self, runner, *args)

    monkeypatch.setattr(QuantizerInitHook, '_reconstruct', twice)
    # Training starts from what was reconstructed.
    runner = make_runner('out', **{**RUN, 'zsq.train.max_epochs': 1})
    runner.train()
    state = torch.load('out/ptq.pth', weights_only=True)['state_dict']
    assert all(torch.equal(state[name], value) for name, value in seen['first'].items())
    settings = json.loads(Path('out/results.json').read_text())['settings']
    assert settings['reconstruction'] == RUN['zsq.reconstruction']
    log = ''.join(path.read_text() for path in Path('out').glob('*/*.log'))
    assert 'reconstruction of ' in log and ' -> ' in log

    before = seen['before']
    after = copy.deepcopy(before)
    after.load_state_dict(state)
    originals = dict(quantized_layers(before))
    moved = 0
    for name, layer in quantized_layers(after):
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer.step, originals[name].weight_quantizer.step)
        difference = quantizer.quantize(layer.filters()) - quantizer.quantize(originals[name].filters())
        assert difference.abs().max() <= 1
        moved += int(difference.abs().sum())
    assert moved > 10
    steps = dict(quantizers(before))
    inputs = [(name, quantizer) for name, quantizer in quantizers(after) if name.endswith('input_quantizer')]
    assert sum(not torch.equal(quantizer.step, steps[name].step) for name, quantizer in inputs) > len(inputs) / 2
    trained = torch.load('out/epoch_1.pth', weights_only=True)['state_dict']
    weights = [name for name in state if name.endswith('conv.weight')]
    assert 0 < max(float((trained[name] - state[name]).abs().max()) for name in weights) < 0.05
