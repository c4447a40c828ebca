# SPDX-License-Identifier: Apache-2.0
"""Measure a step of synthesis of detectors whose loss MMDetection computes image by image.

    python benchmarks/general_path.py
    python benchmarks/general_path.py --only DINO VFNet --size 320 --batch-size 4

Each detector is built from MMDetection's config with random weights, which do not change its time, and synthesizes one
batch with the preset ``default``. A step of RetinaNet, whose loss is batched, is measured for comparison. Results are
written to ``--out``; a detector that fails is reported and the others are measured. ``--page`` writes the table of
docs/performance.md from the results and measures nothing; with ``--check``, it only compares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdet
import torch
from markdown_pages import markdown_table, read_text, renew
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmzsq.config.compose import compose, detector_section
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSetGenerator, StepProgress
from mmzsq.synthesis.label_samplers import fit_masks
from mmzsq.tasks import build_detection_task

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/performance.md'
CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
FAMILIES: dict[str, tuple[str, float | None]] = {
    'RetinaNet': ('retinanet/retinanet_r50_fpn_1x_coco.py', None),
    'YOLOv3': ('yolo/yolov3_d53_8xb8-ms-608-273e_coco.py', 2),
    'VFNet': ('vfnet/vfnet_r50_fpn_1x_coco.py', 6),
    'TOOD': ('tood/tood_r50_fpn_1x_coco.py', 6),
    'PAA': ('paa/paa_r50_fpn_1x_coco.py', 6),
    'Cascade Mask R-CNN': ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', 6),
    'Sparse R-CNN': ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', 8),
    'SOLOv2': ('solov2/solov2_r50_fpn_1x_coco.py', 6),
    'CondInst': ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', 6),
    'RTMDet-Ins': ('rtmdet/rtmdet-ins_s_8xb32-300e_coco.py', 6),
    'DETR': ('detr/detr_r50_8xb2-150e_coco.py', 6),
    'Deformable DETR': ('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', 15),
    'DINO': ('dino/dino-4scale_r50_8xb2-12e_coco.py', 15),
}
"""MMDetection's config of each detector, and the goal in ms per image-iteration on one H200."""


def main() -> None:
    """Parse the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--only', nargs='+', choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument('--size', type=int, default=640, help='side of the images in pixels (default: 640)')
    parser.add_argument('--batch-size', type=int, default=16, help='images in a step (default: 16)')
    parser.add_argument('--steps', type=int, default=48, help='steps; the first half is not timed (default: 48)')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks/results/general_path.json')
    parser.add_argument('--page', action='store_true', help='write the table and measure nothing')
    parser.add_argument('--check', action='store_true', help='with --page: exit with 1 if the page is not up to date')
    args = parser.parse_args()
    if args.page:
        page = read_text(PAGE)
        renew(
            PAGE, page, with_table(page, json.loads(args.out.read_text())), args.check, f'{Path(__file__).name} --page'
        )
        return
    register_all_modules()
    # Initialization logs every parameter.
    MMLogger.get_current_instance().setLevel('WARNING')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        path, goal = FAMILIES[name]
        try:
            measured = measure(path, device, args.size, args.batch_size, args.steps)
        except Exception as error:
            measured = dict(error=f'{type(error).__name__}: {str(error).splitlines()[0][:200]}')
        results[name] = dict(
            config=path, goal=goal, size=args.size, batch_size=args.batch_size, device=describe(device), **measured
        )
        sys.stdout.write(f'{name} {json.dumps(results[name])}\n')
        sys.stdout.flush()
        args.out.write_text(json.dumps(results, indent=1) + '\n')
        if device == 'cuda':
            torch.cuda.empty_cache()


def with_table(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a page with the table of results between its two markers.

    Args:
        page: Content of docs/performance.md.
        results: Content of a result file.
    """
    header = ('detector', 'ms per image-iteration', 'goal', 'between evaluations of the loss', 'CUDA graph')
    rows = [
        (
            name,
            f'{found["ms_per_image_iteration"]:.2f}',
            '' if found['goal'] is None else f'<= {found["goal"]:g}',
            f'{found["median_between_renewals"]:.2f}',
            steps_text(found) if found['cuda_graph'] else found['eager_reason'],
        )
        for name, found in results.items()
        if 'error' not in found
    ]
    first = next(iter(results.values()))
    text = (
        f'{markdown_table(header, rows)}\n\nMeasured on {first["device"]}: {first["size"]} px, batch '
        f'{first["batch_size"]}, random weights.\n\n```bash\npython benchmarks/general_path.py\n```'
    )
    before, begin, rest = page.partition('<!-- general path -->')
    _, end, after = rest.partition('<!-- end of general path -->')
    if not begin or not end:
        raise UserError(
            'docs/performance.md must hold the lines <!-- general path --> and <!-- end of general path -->'
        )
    return f'{before}{begin}\n\n{text}\n\n{end}{after}'


def steps_text(found: Mapping[str, Any]) -> str:
    """Return whether and how steps are captured."""
    interval = found['detection_interval']
    return 'yes' if interval == 1 else f'yes, loss every {interval} steps'


def describe(device: str) -> str:
    """Return the name of a device."""
    return torch.cuda.get_device_name() if device == 'cuda' else 'CPU'


def measure(path: str, device: str, size: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Measure one detector.

    Args:
        path: MMDetection's config.
        device: ``'cuda'`` or ``'cpu'``.
        size: Side of the images in pixels.
        batch_size: Images in a step.
        steps: Steps to run; those of the second half are timed.

    Returns:
        Milliseconds per image and step, the interval of the detection loss, and whether the steps are captured.
    """
    cfg = Config.fromfile(CONFIGS / path)
    drop_downloads(cfg.model)
    cfg.merge_from_dict(dict(zsq=dict(quantizer=dict(w_bits=4, a_bits=8)), load_from='none.pth', work_dir='work_dirs'))
    section = compose(cfg).zsq.to_dict()
    detector = MMDET_MODELS.build(detector_section(cfg))
    detector.init_weights()
    task = build_detection_task(detector.to(device))
    synthesis = section['synthesis']
    for stage in ('relabel', 'refine', 'synthesize'):
        synthesis[stage]['image_size'] = size
    synthesis['require_feature_prior'] = False
    generator = CalibrationSetGenerator(task, synthesis, section['label_sampler'], batch_size, 0)
    labels = generator.sampler.sample(batch_size, (size, size), task.num_classes, torch.Generator().manual_seed(0))
    labels = fit_masks(labels, (size, size), task.needs_masks)
    times: list[tuple[int, float]] = []

    def note(progress: StepProgress) -> None:
        # Reading the losses has waited for the device.
        times.append((progress.iteration, time.perf_counter()))

    result = generator.synthesizer.run(labels, (size, size), steps, seed=0, on_progress=note)
    later = [entry for entry in times if entry[0] >= steps // 2]
    whole = 1000 * (later[-1][1] - later[0][1]) / (later[-1][0] - later[0][0]) / batch_size
    between = [
        1000 * (end[1] - begin[1]) / (end[0] - begin[0]) / batch_size
        for begin, end in zip(later, later[1:], strict=False)
    ]
    return dict(
        ms_per_image_iteration=round(whole, 3),
        median_between_renewals=round(statistics.median(between), 3),
        detection_interval=generator.synthesizer.detection_interval,
        cuda_graph=result.captured,
        eager_reason=generator.synthesizer.eager_reason,
        fp32_reason=getattr(task, 'loss_precision', None) and task.loss_precision.fp32_reason,
    )


def drop_downloads(section: Any) -> None:
    """Remove pretrained weights from a config, in place."""
    if isinstance(section, Mapping):
        init = section.get('init_cfg')
        if isinstance(init, Mapping) and init.get('type') == 'Pretrained':
            section['init_cfg'] = None  # type: ignore[index]
        for value in section.values():
            drop_downloads(value)
    elif isinstance(section, (list, tuple)):
        for value in section:
            drop_downloads(value)


if __name__ == '__main__':
    main()
