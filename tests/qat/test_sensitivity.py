# SPDX-License-Identifier: Apache-2.0
"""The sensitivity of a layer is the loss of a student in which only this layer is quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq.config.presets import preset_section
from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.errors import UserError
from mmzsq.qat import ZeroShotDetector
from mmzsq.qat.sensitivity import mean_loss, measure_sensitivity
from mmzsq.quantization import calibrating, set_quantization

DEFAULT = preset_section('default', {'quantizer': {'w_bits': 4}})

LAYERS = ['backbone.stage2.0.conv', 'neck.top_down_fine.final_conv.conv', 'backbone.stage4.0.conv']
SIZE = 64
# Skips the search for the first steps, which takes a second.
QUANTIZER = dict(
    DEFAULT['quantizer'],
    w_bits=4,
    a_bits=4,
    weight=dict(scheme='signed', per_channel=True, init='lsq'),
    activation=dict(scheme='offset', init='lsq'),
)
EQUALIZED = dict(QUANTIZER, equalize=True)
Make = Callable[..., ZeroShotDetector]


@pytest.fixture(scope='module')
def make(repo: Path) -> Make:
    """A student of the shipped detector without initialized steps."""
    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model.to_dict()

    def make(**options: Any) -> ZeroShotDetector:
        arguments = dict(quantizer=QUANTIZER, distillation=DEFAULT['distillation'])
        arguments |= dict(teacher='mmzsq://yolov5-p_shapes.safetensors')
        model = ZeroShotDetector(copy.deepcopy(cfg), **{**arguments, **options})
        model.init_weights()
        return model

    return make


def batch(start: int) -> dict[str, Any]:
    """Two drawn scenes, as a data loader yields them."""
    inputs, samples = [], []
    for index in (start, start + 1):
        scene = draw_scene(0, index, SIZE)
        shape = (SIZE, SIZE)
        sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.from_numpy(scene.bboxes), labels=torch.from_numpy(scene.labels))
        inputs.append(torch.from_numpy(scene.image).permute(2, 0, 1))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.fixture(scope='module')
def batches() -> list[dict[str, Any]]:
    return [batch(0), batch(2)]


def alone(make: Make, layer: str, bits: int, batches: list[dict[str, Any]], inputs: bool, **options: Any) -> float:
    """Increase of the loss of a student in which only this layer is quantized."""
    only = dict(QUANTIZER, scope=[layer], first_bits='same', last_bits='same', w_bits=bits, a_bits=bits)
    model = make(quantizer=only, **options).eval()
    data = [model.data_preprocessor(copy.deepcopy(batch), False) for batch in batches]

    def loss() -> float:
        losses = [sum(model(**of_batch, mode='loss').values()) for of_batch in data]
        return float(sum(losses)) / len(losses)

    with torch.no_grad():
        with calibrating(model.student):
            model.student(data[0]['inputs'], mode='tensor')
        set_quantization(model, False)
        before = loss()
        set_quantization(model, True)
        model.student.get_submodule(layer).input_quantizer.enabled = inputs
        return loss() - before


@pytest.mark.parametrize('inputs', [True, False])
def test_sensitivity_is_the_loss_of_a_student_with_one_quantized_layer(
    make: Make, batches: list[dict[str, Any]], inputs: bool
) -> None:
    measured = measure_sensitivity(make(), LAYERS[:2], (8, 3), batches, batches[:1], inputs)
    for row, layer in enumerate(LAYERS[:2]):
        for column, bits in enumerate((8, 3)):
            expected = alone(make, layer, bits, batches, inputs)
            assert measured[row, column].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_more_bits_cost_much_less_and_measuring_changes_nothing(make: Make, batches: list[dict[str, Any]]) -> None:
    model = make(augmentation=dict(mosaic=1.0, color=1.0)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[tuple[str, int, int]] = []
    measured = measure_sensitivity(
        model, LAYERS, (2, 8), batches, batches, on_progress=lambda *step: steps.append(step)
    )

    assert (measured[:, 1].abs() < 0.05 * measured[:, 0]).all()
    count = len(LAYERS)
    assert steps[:3] == [('bits', 0, 2), ('bits', 1, 2), ('bits', 2, 2)]
    assert steps[3:] == [('layers', done, count) for done in range(count + 1)]
    assert model.training and model.augmentation is not None
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    # Mosaics and tints are used in training only.
    assert torch.equal(measure_sensitivity(make(), LAYERS[:1], (2, 8), batches, batches), measured[:1])


@pytest.mark.parametrize('inputs', [True, False])
def test_with_equalized_inputs_candidates_are_independent(
    make: Make, batches: list[dict[str, Any]], inputs: bool
) -> None:
    """Each equals that of a separate measurement, and that of a student that starts training with these bits."""
    model = make(quantizer=EQUALIZED)
    measured = measure_sensitivity(model, LAYERS[:1], (8, 2), batches, batches[:1], inputs)
    for column, bits in enumerate((8, 2)):
        assert torch.equal(
            measure_sensitivity(model, LAYERS[:1], (bits,), batches, batches[:1], inputs)[0, 0], measured[0, column]
        )
        own = dict(w_bits=bits, a_bits=bits if inputs else EQUALIZED['a_bits'])
        student = make(quantizer=dict(EQUALIZED, overrides={LAYERS[0]: own})).eval()
        student.initialize_quantizers(batches[:1])
        set_quantization(student, False)
        before = mean_loss(student, batches)
        layer = student.student.get_submodule(LAYERS[0])
        layer.weight_quantizer.enabled, layer.input_quantizer.enabled = True, inputs
        assert measured[0, column].item() == pytest.approx(mean_loss(student, batches) - before, rel=1e-6)


def test_measuring_does_not_change_the_start_of_an_equalized_student(make: Make, batches: list[dict[str, Any]]) -> None:
    students = [make(quantizer=EQUALIZED), make(quantizer=EQUALIZED)]
    measure_sensitivity(students[0], LAYERS, (2, 8), batches, batches[:1])
    for student in students:
        student.initialize_quantizers(batches[:1])
    state, expected = (student.state_dict() for student in students)
    assert state.keys() == expected.keys() and any(name.endswith('input_scale') for name in state)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_random_numbers_are_the_same_in_each_measurement(
    make: Make, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    expected = measure_sensitivity(model, LAYERS[:1], (3, 8), batches, batches[:1])
    parse = ZeroShotDetector.parse_losses

    def noisy(self: Any, losses: Any) -> Any:
        total, log = parse(self, losses)
        return total + torch.rand(()), log

    monkeypatch.setattr(ZeroShotDetector, 'parse_losses', noisy)
    before = torch.get_rng_state()
    measured = measure_sensitivity(model, LAYERS[:1], (3, 8), batches, batches[:1])
    assert torch.allclose(measured, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_detection_loss_counts_if_the_student_learns_from_it(make: Make, batches: list[dict[str, Any]]) -> None:
    distillation = dict(detection_weight=1.0, losses=[])
    measured = measure_sensitivity(make(distillation=distillation), LAYERS[:1], (2,), batches, batches[:1])
    expected = alone(make, LAYERS[0], 2, batches, True, distillation=distillation)
    assert measured.item() == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_not_finite_names_layer_and_bits(
    make: Make, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    parse = ZeroShotDetector.parse_losses

    def overflow(self: Any, losses: Any) -> Any:
        quantized = self.student.get_submodule(LAYERS[0]).weight_quantizer
        total, log = parse(self, losses)
        return (total * float('inf') if quantized.enabled and quantized.bits == 2 else total), log

    monkeypatch.setattr(ZeroShotDetector, 'parse_losses', overflow)
    with pytest.raises(UserError, match=f'with 2 bits in {LAYERS[0]} alone: remove 2 from'):
        measure_sensitivity(model, LAYERS[:1], (8, 2), batches, batches[:1])
