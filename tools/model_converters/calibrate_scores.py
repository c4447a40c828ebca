# SPDX-License-Identifier: Apache-2.0
"""Move the scores of a trained student to those of its teacher, by one offset that is measured on synthetic images.

    python tools/model_converters/calibrate_scores.py configs/zsq/yolov5-n_w4a4.py work_dirs/NAME/epoch_20.pth \
        work_dirs/NAME/calibrated.pth --cfg-options zsq.calibration_set.dir=work_dirs/NAME/calibration_set

The output is a checkpoint as the input is, with other biases in the last layers. Thresholds that were chosen for the
teacher then find about as many objects in the student. No real image is read.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import torch

from mmzsq import cli
from mmzsq.atomic_files import write_atomically
from mmzsq.checkpoint import load_from_local
from mmzsq.errors import UserError
from mmzsq.qat.score_offset import ScoreCalibration
from mmzsq.qat.student_checkpoint import check_student


def main() -> None:
    """Parse the command line, measure, write."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument('checkpoint', type=Path, help='checkpoint of the student')
    options.add_argument('out', type=Path, help='checkpoint to write')
    options.add_argument('--batches', type=int, default=4, help='training batches to measure on (default: 4)')
    args = options.parse_args()
    if not args.checkpoint.is_file():
        raise UserError(f'checkpoint {args.checkpoint} does not exist')
    runner: Any = cli.build_runner(cli.load_config(args))
    checkpoint = load_from_local(str(args.checkpoint), map_location='cpu')
    detector = runner.detector
    detector.load_bits_from(checkpoint)
    detector.load_state_dict(check_student(detector, checkpoint, str(args.checkpoint)))
    detector.eval()
    last = [layer.name for layer in detector.report.layers if 'last' in layer.role]
    calibration = ScoreCalibration(detector.student, detector.load_teacher(), last)
    batches = []
    for batch in itertools.islice(runner.train_dataloader, args.batches):
        data = detector.data_preprocessor(batch, False)
        batches.append((data['inputs'], data['data_samples']))
    offset = calibration.measure(batches)
    changed = calibration.add(offset, *batches[0])
    weights = detector.state_dict()
    checkpoint['state_dict'].update({name: weights[name].cpu() for name in changed})
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(args.out, content.getvalue())
    runner.logger.info(f'offset {offset:+.3f} added to {", ".join(changed)}; {args.out} is written')


if __name__ == '__main__':
    main()
