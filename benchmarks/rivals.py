# SPDX-License-Identifier: Apache-2.0
"""Other tools beside this package: YOLOv5-n, the same images, the same evaluation.

    python benchmarks/rivals.py --teacher checkpoints/yolov5n.safetensors --only ours
    work_dirs/mct/bin/python benchmarks/rivals.py --teacher checkpoints/yolov5n.safetensors --only mct
    python benchmarks/rivals.py --page

Sony's model-compression-toolkit needs an environment of its own, because it wants an older pydantic. It imports this
package as well: make it on top of the one that has it, ``python -m venv --system-site-packages work_dirs/mct`` and
``work_dirs/mct/bin/pip install model-compression-toolkit``. The toolkit quantizes the network up to the raw maps of the
head, as all tools do here, for its default target, IMX500: weights of 8 or 4 bits per channel, activations of 8 bits
with steps that are powers of two. Its 4-bit rows keep the first and the last layers at 8 bits, as ours do.
``--page`` writes the table of docs/comparison.md from ``benchmarks/results/rivals`` and ``benchmarks/results/deploy``,
which has NNCF, ``onnxruntime.quantization`` and our students.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy_accuracy import Bench
from deploy_models import (
    RESULTS,
    ROOT,
    WORK_DIR,
    build_float,
    build_student,
    describe_cpu,
    describe_versions,
    evaluate,
    load_config,
    write_result,
)
from markdown_pages import markdown_table, read_text, renew
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization import calibrating

OUT = Path('benchmarks/results/rivals')
PAGE = Path('docs/comparison.md')
MARKERS = ('<!-- rivals -->', '<!-- end of rivals -->')
MCT = 'model-compression-toolkit'
MCT_BITS = ('w8a8', 'w4a8')
"""Bits that the toolkit's default target offers in all layers, beside 2-bit weights."""
OUR_BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
GPTQ_EPOCHS = 5
GPTQ_IMAGES = 16
GPTQ_BATCH = 4
EVALUATION_BATCH = 2
SOURCE_TITLES = dict(
    noise='noise', procedural='procedural pictures', synthetic='synthetic images', real32='real images',
    real300='real images',
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        tool: ``'mct-ptq'``, ``'mct-gptq'`` or ``'ours-ptq'``.
        bits: Such as ``'w4a8'``.
        source: Images that the tool reads, see :meth:`~deploy_accuracy.Bench.inputs`.
    """

    tool: str
    bits: str
    source: str

    @property
    def name(self) -> str:
        """Stem of its file."""
        return f'{self.tool}_{self.bits}_{self.source}'


CASES = (
    *(Case('mct-ptq', bits, source) for source in ('procedural', 'real32', 'synthetic') for bits in MCT_BITS),
    *(Case('mct-gptq', bits, 'procedural') for bits in MCT_BITS),
    *(Case('ours-ptq', bits, source) for source in ('procedural', 'real32') for bits in OUR_BITS),
)


class RawMaps(nn.Module):
    """YOLOv5 from normalized images to the raw maps of its head, in a form that ``torch.fx`` can trace.

    Args:
        detector: The float detector.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.neck = detector.neck
        self.convs = detector.bbox_head.convs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return one map for each scale.

        Args:
            images: Shape (N, 3, H, W), float32.
        """
        maps = self.neck(self.backbone(images))
        return tuple(conv(feature) for conv, feature in zip(self.convs, maps, strict=True))


def quantize_with_mct(network: nn.Module, inputs: np.ndarray, case: Case) -> nn.Module:
    """Quantize a network with Sony's toolkit.

    Args:
        network: The float network, from images to raw maps.
        inputs: Its inputs, (N, 3, H, W) float32.
        case: The row.

    Raises:
        UserError: If the toolkit is not installed.
    """
    try:
        import model_compression_toolkit as mct
        from model_compression_toolkit.core.common.network_editors.node_filters import (
            NodeNameScopeFilter,
            NodeTypeFilter,
        )
    except ImportError as error:
        raise UserError(f'{MCT} is not installed here: see the first lines of benchmarks/rivals.py') from error
    core = mct.core.CoreConfig()
    if case.bits == 'w4a8':
        convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        ends = [convolutions[0], *(name for name in convolutions if name.startswith('convs.'))]
        core.bit_width_config.set_manual_weights_bit_width(NodeTypeFilter(nn.Conv2d), 4, 'weight')
        for name in ends:
            core.bit_width_config.set_manual_weights_bit_width(NodeNameScopeFilter(name.replace('.', '_')), 8, 'weight')

    def batches(size: int) -> Callable[[], Iterator[list[Tensor]]]:
        def generate() -> Iterator[list[Tensor]]:
            for start in range(0, len(inputs), size):
                yield [torch.from_numpy(np.array(inputs[start : start + size]))]

        return generate

    if case.tool == 'mct-ptq':
        quantized, _ = mct.ptq.pytorch_post_training_quantization(network, batches(1), core_config=core)
    else:
        config = mct.gptq.get_pytorch_gptq_config(n_epochs=GPTQ_EPOCHS, hessian_batch_size=GPTQ_BATCH)
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            network, batches(GPTQ_BATCH), core_config=core, gptq_config=config
        )
    return quantized.eval()


def build(bench: Bench, case: Case) -> tuple[Any, dict[str, Any]]:
    """Return the quantized detector of a row, and entries for its result."""
    inputs = np.load(bench.inputs(case.source), mmap_mode='r')
    if case.tool == 'mct-gptq':
        inputs = inputs[:GPTQ_IMAGES]
    detector = build_float(bench.config, bench.teacher)
    # Seconds of a core, not of the clock: other programs may share it.
    start = time.process_time()
    if case.tool.startswith('mct'):
        quantized = quantize_with_mct(RawMaps(detector).eval(), inputs, case)
        detector.extract_feat = lambda images: images
        detector.bbox_head.forward = lambda images: (list(quantized(images)),)
    else:
        detector = calibrate_ours(detector, inputs, case.bits)
    return detector, dict(images=len(inputs), quantization_seconds=round(time.process_time() - start, 1))


@torch.no_grad()
def calibrate_ours(detector: Any, inputs: np.ndarray, bits: str) -> Any:
    """Return our student of a float detector before any training, as ``ptq.pth`` of a run has it.

    Args:
        detector: The float detector.
        inputs: Its normalized inputs, (N, 3, H, W) float32.
        bits: Such as ``'w4a8'``.
    """
    student = build_student(load_config(f'configs/zsq/yolov5-n_{bits}.py'), None, detector, calibrate=False)
    with calibrating(student):
        for image in inputs:
            student.bbox_head(student.extract_feat(torch.from_numpy(np.array(image[None]))))
    return student


def run(bench: Bench, cases: Sequence[Case], out: Path, limit: int | None = None) -> None:
    """Quantize, evaluate and write one file for each case that has none.

    Args:
        bench: Has the teacher and the images.
        cases: In order.
        out: Folder of the results.
        limit: As of :func:`~deploy_models.evaluate`.
    """
    # Images are letterboxed to one size, so that this changes nothing but the memory.
    bench.config.test_dataloader.batch_size = EVALUATION_BATCH
    for case in cases:
        path = out / f'{case.name}.json'
        if path.is_file():
            continue
        detector, entries = build(bench, case)
        metrics = evaluate(detector, bench.config, limit)
        versions = describe_versions()
        if case.tool.startswith('mct'):
            versions[MCT] = version(MCT.replace('-', '_'))
        result = dict(
            tool=case.tool,
            bits=case.bits,
            source=case.source,
            **entries,
            AP=metrics['coco/bbox_mAP'],
            AP50=metrics['coco/bbox_mAP_50'],
            evaluation_images=metrics['images'],
            command=f'python benchmarks/rivals.py --only {case.tool}',
            cpu=describe_cpu(),
            versions=versions,
        )
        write_result(path, result)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        tool: Title of the tool.
        method: Title of the method.
        data: Images that it reads.
        minutes: Time of the quantization on a CPU; empty if unknown.
        aps: AP in percent by bits.
    """

    tool: str
    method: str
    data: str
    minutes: str
    aps: dict[str, str]


METHODS = {
    'mct-ptq': ("Sony's MCT", 'PTQ'),
    'mct-gptq': ("Sony's MCT", f'GPTQ, {GPTQ_EPOCHS} epochs'),
    'ours-ptq': ('mmzsq', 'PTQ'),
    'nncf': ('NNCF', 'PTQ, fast bias correction'),
    'onnxruntime_static': ('ONNX Runtime', '`quantize_static`'),
}


def table_rows(rivals: Path, deploy: Path) -> Iterator[Row]:
    """Yield the lines of the table.

    Args:
        rivals: Folder of the results of this script.
        deploy: Folder of those of ``deploy_accuracy.py``.
    """
    kept = [_read(path) for path in sorted(rivals.glob('*.json'))]
    kept += [dict(_read(path), bits='w8a8') for path in sorted(deploy.glob('calibration_*.json'))]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in kept:
        groups.setdefault((result.get('tool') or result['what'], result['source']), []).append(result)
    order = {tool: place for place, tool in enumerate(METHODS)}
    sources = list(SOURCE_TITLES)
    for tool, source in sorted(groups, key=lambda key: (order[key[0]], sources.index(key[1]))):
        results = groups[tool, source]
        count = results[0].get('images') or results[0]['calibration_images']
        seconds = [result['quantization_seconds'] for result in results]
        yield Row(
            *METHODS[tool],
            f'{count} {SOURCE_TITLES[source]}',
            _minutes(min(seconds), max(seconds)),
            {result['bits']: _percent(result['AP']) for result in results},
        )
    students = {bits: deploy / f'accuracy_{bits}_torch.json' for bits in OUR_BITS}
    aps = {bits: _percent(_read(path)['AP']) for bits, path in students.items() if path.is_file()}
    yield Row('mmzsq', '`default`, training', '512 synthetic images, made by it', '3.2 on one H200', aps)


def render(rivals: Path, deploy: Path) -> str:
    """Render the table and where it comes from."""
    rows = list(table_rows(rivals, deploy))
    shown = [bits for bits in OUR_BITS if any(bits in row.aps for row in rows)]
    header = ['tool', 'method', 'data', 'minutes', *map(str.upper, shown)]
    table = markdown_table(
        header, [[row.tool, row.method, row.data, row.minutes, *(row.aps.get(b, '') for b in shown)] for row in rows]
    )
    kept = [_read(path) for path in sorted(rivals.glob('*.json'))]
    commands = '\n'.join(dict.fromkeys(result['command'] for result in kept))
    known = {name: value for result in kept for name, value in result['versions'].items()}
    versions = ', '.join(f'{name} {value}' for name, value in known.items())
    return f'{table}\n\n```bash\n{commands}\n```\n\nMeasured with {versions}.'


def update_page(check: bool = False) -> None:
    """Write the table into docs/comparison.md, or check it."""
    page = ROOT / PAGE
    current = read_text(page)
    block = f'{MARKERS[0]}\n\n{render(ROOT / OUT, ROOT / RESULTS)}\n\n{MARKERS[1]}'
    updated = re.sub(f'{MARKERS[0]}.*{MARKERS[1]}', lambda _: block, current, flags=re.DOTALL)
    renew(page, current, updated, check, 'python benchmarks/rivals.py --page')


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(read_text(path))
    return content


def _percent(value: float) -> str:
    return f'{100 * value:.1f}'


def _minutes(low: float, high: float) -> str:
    ends = list(dict.fromkeys(f'{seconds / 60:.1f}' for seconds in (low, high)))
    return ' to '.join(ends)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, then measure or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--page', action='store_true', help=f'write the table of {PAGE} and measure nothing')
    parser.add_argument('--check', action='store_true', help='with --page: write nothing, fail if it is outdated')
    parser.add_argument('--teacher', type=Path, help="float checkpoint (default: the config's load_from)")
    parser.add_argument('--images', type=Path, help='synthetic set in the layout npy')
    parser.add_argument('--files', type=Path, default=WORK_DIR, help=f'folder of inputs (default: {WORK_DIR})')
    parser.add_argument('--only', nargs='+', default=[''], metavar='TEXT', help='rows whose names contain one of these')
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch (default: 1)')
    args = parser.parse_args(arguments)
    if args.page:
        update_page(args.check)
        return
    torch.set_num_threads(args.threads)
    bench = Bench(args.teacher, None, args.images, args.files, threads=args.threads)
    cases = [case for case in CASES if any(text in case.name for text in args.only)]
    run(bench, cases, ROOT / OUT)


if __name__ == '__main__':
    main()
