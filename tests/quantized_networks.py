# SPDX-License-Identifier: Apache-2.0
"""Small quantized networks, exported and run, for the tests of deployment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmzsq.deploy import BuiltGraph, Session, build, export_marked
from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare


class Flat(nn.Module):
    """Any network, with its outputs as a flat tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def quantized(model: nn.Module, x: Tensor, **config: Any) -> nn.Module:
    """Quantize a network and calibrate it on ``x``."""
    cfg = QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same', **config))
    prepare(model.eval(), cfg)
    with torch.no_grad():
        if cfg.equalize:
            equalize(model, lambda: model(x))
        with calibrating(model):
            model(x)
    return model


def lowered(model: nn.Module, x: Tensor, target: str = 'openvino', **options: Any) -> BuiltGraph:
    int4 = options.pop('int4', False)
    return build(export_marked(Flat(model), x, root=model, opset=20 if int4 else 17, **options), target, int4)


def outputs(built: BuiltGraph, x: Tensor, runtime: str) -> list[Tensor]:
    session = Session(built.model.SerializeToString(), runtime, threads=1, exact=True)
    return [torch.from_numpy(output) for output in session(x.numpy())]
