# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training for any eager model: quantized layers with learned steps.

    config = QuantizationConfig.from_dict(dict(type='mmzsq.LSQ', w_bits=4, a_bits=8))
    report = prepare(model, config, run=lambda: model(image))
    with torch.no_grad(), calibrating(model):
        model(images)
    report.to_table()

This package is independent of detectors, synthesis, distillation and runners.
"""

from mmzsq.quantization.attention import (
    QuantizedAttention,
    QuantMatmul,
    register_quantized_attention,
)
from mmzsq.quantization.calibrate import (
    calibrating,
    quantizers,
    set_quantization,
    step_parameters,
)
from mmzsq.quantization.config import QuantizationConfig
from mmzsq.quantization.convolutions import (
    QuantConv2dAdaptivePadding,
    QuantConvAWS2d,
    QuantConvWS2d,
    QuantDeformConv2d,
    QuantDeformConv2dPack,
    QuantModulatedDeformConv2d,
    QuantModulatedDeformConv2dPack,
)
from mmzsq.quantization.equalize import constant_input_scales, equalize
from mmzsq.quantization.fake_quantize import fake_quantize, quantize
from mmzsq.quantization.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantizedLayer,
    QuantLinear,
    quantized_layers,
    register_quantized,
)
from mmzsq.quantization.prepare import prepare
from mmzsq.quantization.quantizers import LSQ, LSQPlus
from mmzsq.quantization.report import LayerReport, QuantizationReport

__all__ = [
    'LSQ',
    'LSQPlus',
    'LayerReport',
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv2dAdaptivePadding',
    'QuantConvAWS2d',
    'QuantConvTranspose2d',
    'QuantConvWS2d',
    'QuantDeformConv2d',
    'QuantDeformConv2dPack',
    'QuantLinear',
    'QuantMatmul',
    'QuantModulatedDeformConv2d',
    'QuantModulatedDeformConv2dPack',
    'QuantizationConfig',
    'QuantizationReport',
    'QuantizedAttention',
    'QuantizedLayer',
    'calibrating',
    'constant_input_scales',
    'equalize',
    'fake_quantize',
    'prepare',
    'quantize',
    'quantized_layers',
    'quantizers',
    'register_quantized',
    'register_quantized_attention',
    'set_quantization',
    'step_parameters',
]
