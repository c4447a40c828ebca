# SPDX-License-Identifier: Apache-2.0
"""Quantize an ONNX file with NNCF, for comparison. Runs in an environment with nncf and openvino and nothing else.

    work_dirs/nncf/bin/python benchmarks/nncf_quantize.py detector.onnx inputs.npy quantized.xml

``inputs.npy`` holds network inputs (N, 3, H, W), float32 and normalized; all of them are used. The preset is MIXED
(asymmetric activations, symmetric weights), with fast bias correction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nncf
import numpy as np
import openvino


def main() -> None:
    """Parse the command line, quantize, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('model', type=Path, help='float ONNX file')
    parser.add_argument('inputs', type=Path, help='.npy of network inputs')
    parser.add_argument('out', type=Path, help='.xml to write, with a .bin beside it')
    args = parser.parse_args()
    inputs = np.load(args.inputs, mmap_mode='r')
    quantized = nncf.quantize(
        openvino.Core().read_model(args.model),
        nncf.Dataset([image[None] for image in inputs]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(inputs),
        fast_bias_correction=True,
    )
    # The .xml appears last: it says that the pair is complete.
    part = args.out.with_name(f'{args.out.stem}.part.xml')
    openvino.save_model(quantized, part, compress_to_fp16=False)
    part.with_suffix('.bin').replace(args.out.with_suffix('.bin'))
    part.replace(args.out)


if __name__ == '__main__':
    main()
