# SPDX-License-Identifier: Apache-2.0
"""Write the measured tables of docs/deploy.md, or check them.

    python benchmarks/deploy_page.py
    python benchmarks/deploy_page.py --check

The tables come from the files in ``benchmarks/results/deploy``, which ``deploy_speed.py``, ``deploy_accuracy.py`` and
``deploy_size.py`` write. Each table stands between two lines:

    <!-- deploy: speed -->
    <!-- end of speed -->

The names are speed, accuracy, calibration, size and goals. The rest of the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_accuracy import BITS, SOURCES, TOOLS
from deploy_models import RESULTS
from deploy_size import FILES
from deploy_speed import DETECTORS, RUNTIME_TITLES, ratio, speed_table
from markdown_pages import ROOT, markdown_table, read_text, renew

from mmzsq.errors import UserError

PAGE = 'docs/deploy.md'
ENGINE_TITLES = dict(torch='PyTorch', **RUNTIME_TITLES)
TOOL_TITLES = dict(nncf='NNCF, MIXED, fast bias correction', onnxruntime_static='quantize_static, MinMax, per channel')
SOURCE_TITLES = dict(
    noise='noise',
    procedural='procedural pictures',
    synthetic='synthetic images',
    real32='real images',
    real300='real images',
)
SAME_AP = 0.003
"""Greatest difference between a file and its checkpoint on 200 images: below it lies the noise of an engine."""


@dataclass(frozen=True)
class Results:
    """Kept results.

    Attributes:
        files: Contents of the files by stem.
    """

    files: Mapping[str, Mapping[str, Any]]

    def starting(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Return those whose stem starts with a prefix."""
        return {name: content for name, content in self.files.items() if name.startswith(prefix)}

    def ap(self, name: str) -> float | None:
        """Return the AP of one evaluation, in [0, 1], or None if there is none."""
        content = self.files.get(name)
        return None if content is None else float(content['AP'])

    def times(self, detector: str, threads: int) -> Mapping[str, Sequence[float]]:
        """Return ms of each round by variant of a one-stage detector; empty if it was not measured."""
        for entry in self.files.get(f'speed_{detector}', {}).get('graphs', []):
            if entry['graph'] == 'detector' and entry['threads'] == threads:
                return dict(entry['ms'])
        return {}


def read_results(folder: Path) -> Results:
    """Read all results of a folder."""
    return Results({path.stem: json.loads(read_text(path)) for path in sorted(folder.glob('*.json'))})


def render_speed(results: Results) -> str:
    """Render the latencies of all detectors."""
    kept = results.starting('speed_')
    measured = [kept[f'speed_{detector.name}'] for detector in DETECTORS if f'speed_{detector.name}' in kept]
    if not measured:
        return _nothing('deploy_speed.py')
    table = speed_table(measured)
    note = (
        'Medians in ms for one image of 640x640 pixels, or 1000 regions; all variants in turn in one process. '
        '"Times faster" compares with float in the same runtime, as the median over rounds. OpenVINO computes '
        'floats in f32 unless the row says bf16.'
    )
    return '\n\n'.join([table, note, *_provenance(measured)])


def render_accuracy(results: Results) -> str:
    """Render the AP of students in all engines."""
    kept = results.starting('accuracy_')
    if not kept:
        return _nothing('deploy_accuracy.py')
    rows = []
    titles = {bits: bits.upper() for bits in BITS}
    titles |= {
        'w8a8-outputs': "W8A8, `quantizer.target='onnxruntime'`",
        'w8a8-tensorrt': "W8A8, `quantizer.target='tensorrt'`",
    }
    for what, title in dict(float='full precision', **titles).items():
        aps = [results.ap(f'accuracy_{what}_{engine}') for engine in ENGINE_TITLES]
        if any(ap is not None for ap in aps):
            rows.append([title, *map(_percent, aps)])
    images = next(iter(kept.values()))['evaluation_images']
    note = (
        f'AP in percent of YOLOv5-n on {images} images of val2017. Students are trained on 512 synthetic images with '
        'the preset `default`. PyTorch runs the checkpoint, the runtimes its exported files.'
    )
    return '\n\n'.join([markdown_table(['', *ENGINE_TITLES.values()], rows), note, *_provenance(kept.values())])


def render_calibration(results: Results) -> str:
    """Render the AP of other tools by the images that they calibrate on."""
    kept = results.starting('calibration_')
    if not kept:
        return _nothing('deploy_accuracy.py')
    rows = []
    for source in SOURCES:
        found = {tool: kept[f'calibration_{tool}_{source}'] for tool in TOOLS if f'calibration_{tool}_{source}' in kept}
        if found:
            count = next(iter(found.values()))['calibration_images']
            aps = [_percent(results.ap(f'calibration_{tool}_{source}')) for tool in TOOLS]
            rows.append([f'{count} {SOURCE_TITLES[source]}' if source != 'noise' else f'{count} images of noise', *aps])
    ours = [results.ap(f'accuracy_w8a8_{engine}') for engine in TOOLS.values()]
    if any(ap is not None for ap in ours):
        rows.append(['ours, a student trained on 512 synthetic images', *map(_percent, ours)])
    header = ['calibrated on', *(f'{TOOL_TITLES[tool]} ({RUNTIME_TITLES[engine]})' for tool, engine in TOOLS.items())]
    note = (
        'AP in percent of YOLOv5-n in 8 bits on the same images, with the same preprocessing. The tools quantize the '
        'float file without training. The synthetic images are the first of the set that our student was trained on.'
    )
    return '\n\n'.join([markdown_table(header, rows), note, *_provenance(kept.values())])


def render_size(results: Results) -> str:
    """Render the sizes of files."""
    kept = results.starting('size_')
    if not kept:
        return _nothing('deploy_size.py')
    rows = []
    for name in ('float', *(f'{bits}_int4' if int4 else bits for bits, int4 in FILES)):
        cells = []
        for content in kept.values():
            sizes = content['bytes']
            cells += [f'{sizes[name] / 1e6:.2f}', f'{sizes["float"] / sizes[name]:.2f}'] if name in sizes else ['', '']
        bits, _, int4 = name.partition('_')
        title = 'float' if name == 'float' else f'{bits.upper()}, {"INT4" if int4 else "8-bit containers"}'
        rows.append([title, *cells])
    header = ['file']
    for content in kept.values():
        header += [f'{content["title"]}, MB', 'times smaller']
    return '\n\n'.join([markdown_table(header, rows), *_provenance(kept.values())])


def render_goals(results: Results) -> str:
    """Render goals with measured values."""
    rows = [
        [text, goal, *(('', 'not measured') if value is None else (value, 'yes' if reached else 'no'))]
        for text, goal, value, reached in _goals(results)
    ]
    return markdown_table(['', 'goal', 'measured', 'reached'], rows)


Goal = tuple[str, str, str | None, bool]
"""Title, limit, measured value or None, whether it is reached."""


def _goals(results: Results) -> list[Goal]:
    times = results.times('yolov5-n', 1)
    over_float = _ratio(times, 'openvino_float', 'openvino_w8a8')
    over_nncf = _ratio(times, 'openvino_nncf', 'openvino_w8a8')
    in_onnxruntime = _ratio(times, 'onnxruntime_float', 'onnxruntime_w8a8_outputs')
    goals = [
        _at_least('YOLOv5-n W8A8, OpenVINO, 1 thread, over float', over_float, 2.2),
        _at_least('the same over NNCF', over_nncf, 1.2),
        _ap_of_nncf(results),
        _at_least('YOLOv5-n W8A8 with quantized outputs, ONNX Runtime, 1 thread, over float', in_onnxruntime, 1.6),
        _outputs_lose_little(results),
        *(_file_equals_checkpoint(results, bits) for bits in BITS),
    ]
    sizes = results.files.get('size_yolov5-n', {}).get('bytes', {})
    for name, limit in (('w8a8', 3.6), ('w4a8_int4', 5.0)):
        factor = sizes['float'] / sizes[name] if name in sizes else None
        title = name.replace('_int4', ' as INT4').replace('w', 'W', 1).replace('a', 'A', 1)
        goals.append(_at_least(f'file of YOLOv5-n, {title}, times smaller than float', factor, limit))
    return goals


def _at_least(title: str, value: float | None, limit: float) -> Goal:
    return title, f'>= {limit}x', None if value is None else f'{value:.2f}x', value is not None and value >= limit


def _ap_of_nncf(results: Results) -> Goal:
    ours = results.ap('accuracy_w8a8_openvino')
    theirs = [results.ap(f'calibration_nncf_{source}') for source in ('real32', 'real300')]
    known = [ap for ap in theirs if ap is not None]
    title = "AP of YOLOv5-n W8A8 in OpenVINO, against NNCF's best on real images"
    if ours is None or not known:
        return title, ">= NNCF's", None, False
    return title, ">= NNCF's", f'{_percent(ours)}, {_percent(max(known))}', ours >= max(known)


def _outputs_lose_little(results: Results) -> Goal:
    title = 'AP(file) - AP(checkpoint) of W8A8 with trained grids on outputs, ONNX Runtime'
    limit = f'>= -{100 * SAME_AP:.1f}'
    file, checkpoint = (results.ap(f'accuracy_w8a8-outputs_{engine}') for engine in ('onnxruntime', 'torch'))
    if file is None or checkpoint is None:
        return title, limit, None, False
    difference = round(file - checkpoint, 5)
    return title, limit, f'{100 * difference:+.1f}', difference >= -SAME_AP


def _file_equals_checkpoint(results: Results, bits: str) -> Goal:
    checkpoint = results.ap(f'accuracy_{bits}_torch')
    found = {engine: results.ap(f'accuracy_{bits}_{engine}') for engine in RUNTIME_TITLES}
    title, limit = f'AP(file) - AP(checkpoint), {bits.upper()}', f'within {100 * SAME_AP:.1f}'
    if checkpoint is None or any(ap is None for ap in found.values()):
        return title, limit, None, False
    differences = {engine: round((ap or 0.0) - checkpoint, 5) for engine, ap in found.items()}
    text = ', '.join(f'{100 * value:+.1f} in {RUNTIME_TITLES[engine]}' for engine, value in differences.items())
    return title, limit, text, max(map(abs, differences.values())) <= SAME_AP


def _ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float | None:
    return ratio(times, slow, fast) if slow in times and fast in times else None


def _percent(ap: float | None) -> str:
    return '' if ap is None else f'{100 * ap:.1f}'


def _nothing(script: str) -> str:
    return f'Not measured yet: run `python benchmarks/{script}`.'


def _provenance(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Commands, CPU and versions of results."""
    results = list(results)
    commands = list(dict.fromkeys(result['command'] for result in results))
    machines = list(dict.fromkeys(_machine(result) for result in results))
    versions: dict[str, str] = {}
    for result in results:
        versions.update(result['versions'])
    text = ', '.join(f'{name} {version}' for name, version in versions.items())
    commands_text = '\n'.join(commands)
    return [f'```bash\n{commands_text}\n```', f'Measured {"".join(f"on {m}; " for m in machines if m)}with {text}.']


def _machine(result: Mapping[str, Any]) -> str:
    cpu = result.get('cpu')
    return '' if cpu is None else f'{cpu["name"]}, {cpu["cores"]} cores ({", ".join(cpu["features"])})'


BLOCKS: dict[str, Callable[[Results], str]] = dict(
    speed=render_speed,
    accuracy=render_accuracy,
    calibration=render_calibration,
    size=render_size,
    goals=render_goals,
)


def render(page: str, results: Results) -> str:
    """Replace the content of each block of a page.

    Args:
        page: Text of the page.
        results: Kept results.

    Raises:
        UserError: If the page lacks the two lines of a block.
    """
    for name, render_block in BLOCKS.items():
        begin, end = f'<!-- deploy: {name} -->', f'<!-- end of {name} -->'
        pattern = re.compile(rf'({re.escape(begin)}\n).*?({re.escape(end)})', re.DOTALL)
        text = render_block(results)
        page, count = pattern.subn(lambda block, text=text: f'{block[1]}\n{text}\n\n{block[2]}', page)  # type: ignore[misc]
        if count != 1:
            raise UserError(f'{PAGE} must hold the lines {begin} and {end} once')
    return page


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the page is not up to date')
    parser.add_argument(
        '--root', type=Path, default=ROOT, help='folder with benchmarks/results/ and docs/ (default: this repository)'
    )
    args = parser.parse_args(arguments)
    page = args.root / PAGE
    try:
        current = read_text(page)
        updated = render(current, read_results(args.root / RESULTS))
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    renew(page, current, updated, args.check, Path(__file__).name)


if __name__ == '__main__':
    main()
