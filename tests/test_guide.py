# SPDX-License-Identifier: Apache-2.0
"""Run the configs and commands of docs/your_detector.md and of the README on a small version of its detector."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import base_dataset
from PIL import Image

from mmzsq import base, cli, predict, quantize
from mmzsq.errors import UserError
from mmzsq.report import __main__ as report

GUIDE = Path(__file__).resolve().parents[1] / 'docs' / 'your_detector.md'
README = GUIDE.parents[1] / 'README.md'
TOOLS = ('mmzsq.train', 'mmzsq.test', 'mmzsq.generate', 'mmzsq.export')
SMALL_DETECTOR = (
    *('model.backbone.depth=18', 'model.backbone.base_channels=8', 'model.backbone.init_cfg=None'),
    # Two of four stages: the time of most commands is proportional to the number of layers.
    *('model.backbone.num_stages=2', 'model.backbone.strides=[1,2]', 'model.backbone.dilations=[1,1]'),
    *('model.backbone.out_indices=[0,1]', 'model.neck.in_channels=[8,16]', 'model.neck.out_channels=8'),
    *('model.bbox_head.in_channels=8', 'model.bbox_head.feat_channels=8', 'model.bbox_head.stacked_convs=1'),
)
SMALL_RUN = (
    *('val_dataloader.dataset.pipeline.1.scale=(96,96)', 'test_dataloader.dataset.pipeline.1.scale=(96,96)'),
    *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
    *('test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False'),
)
SMALL_SET = (
    *('zsq.calibration_set.num_images=2', 'zsq.label_sampler.warmup=1', 'zsq.label_sampler.interval=1'),
    *('zsq.synthesis.relabel.image_size=64', 'zsq.synthesis.relabel.iterations=2'),
    *('zsq.synthesis.synthesize.image_size=64', 'zsq.synthesis.synthesize.iterations=2'),
    *('zsq.train.max_epochs=2', 'zsq.train.batch_size=2', 'zsq.train.num_workers=0', 'zsq.train.init_batches=1'),
    # Skips the search for the first steps.
    *('zsq.quantizer.weight.init=lsq', 'zsq.quantizer.activation.init=lsq'),
)
LAST = 'epoch_20.pth'


def blocks(language: str, page: Path = GUIDE) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def commands(page: Path = GUIDE) -> list[list[str]]:
    """Commands of a page, each split into words."""
    lines = [line for block in blocks('bash', page) for line in block.replace('\\\n', ' ').splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def site(tmp_path: Path, unformatted_configs: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the guide's files, a teacher, and two evaluation images."""
    monkeypatch.chdir(tmp_path)
    # Each data set of MMEngine collects garbage before it serializes its records: a third of a second.
    monkeypatch.setattr(base_dataset, 'gc', SimpleNamespace(collect=lambda: 0))
    for block in blocks('python'):
        name, _, text = block.partition('\n')
        (tmp_path / name.removeprefix('# ')).write_text(text)
    images = tmp_path / 'data/site/val'
    images.mkdir(parents=True)
    for index in range(2):
        Image.fromarray(np.full((90, 120, 3), 128, np.uint8)).save(images / f'{index:03d}.jpg')
    truth = dict(
        images=[dict(id=index, file_name=f'{index:03d}.jpg', width=120, height=90) for index in range(2)],
        annotations=[dict(id=1, image_id=0, category_id=1, bbox=[10, 10, 60, 50], area=3000, iscrowd=0)],
        categories=[dict(id=1, name='helmet'), dict(id=2, name='vest')],
    )
    (tmp_path / 'data/site/annotations').mkdir()
    (tmp_path / 'data/site/annotations/val.json').write_text(json.dumps(truth))
    register_all_modules()
    cfg = Config.fromfile('my_detector.py')
    cfg.merge_from_dict(dict(_options(SMALL_DETECTOR)))
    teacher = MODELS.build(cfg.model)
    teacher.init_weights()
    # AP is NaN without any detection.
    torch.nn.init.zeros_(teacher.bbox_head.retina_cls.bias)
    (tmp_path / 'work_dirs/my_detector').mkdir(parents=True)
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / 'work_dirs/my_detector/epoch_12.pth')
    return tmp_path


def _options(changes: tuple[str, ...]) -> list[tuple[str, Any]]:
    pairs = (change.split('=') for change in changes)
    return [(key, None if value == 'None' else json.loads(value)) for key, value in pairs]


@pytest.fixture
def run(site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Run one command of the guide in this process, with options appended that make it small."""

    def run(words: list[str]) -> None:
        python, flag, module, *arguments = words
        assert (python, flag) == ('python', '-m')
        assert all((site / word).is_file() for word in arguments if word.endswith(('.py', '.pth')))
        small = (*SMALL_DETECTOR, *SMALL_RUN, *(SMALL_SET if 'my_detector_w4a8.py' in arguments else ()))
        if any('allocate' in word for word in arguments):
            small += ('zsq.quantizer.allocate.candidates=[3,8]',)
        options = [] if '--cfg-options' in arguments else ['--cfg-options']
        monkeypatch.setattr(sys, 'argv', [module, *arguments, *options, *small])
        cli.run(importlib.import_module(module).main)

    return run


@pytest.mark.filterwarnings('ignore:.*instance named of:UserWarning')
def test_all_commands_of_the_guide_run_in_order(
    run: Callable[[list[str]], None], site: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = site / 'work_dirs/my_detector_w4a8'
    done = []
    for words in commands():
        if words[2] in TOOLS:
            run(words)
        elif words[2] == 'mmzsq.report':
            # There is no run with 4-bit activations here.
            monkeypatch.setattr(sys, 'argv', [word.replace('_w4a4', '_w4a8') for word in words[2:]])
            cli.run(report.main)
        elif words[2] == 'mmzsq.base':
            monkeypatch.setattr(sys, 'argv', words[2:])
            cli.run(base.main)
        elif 'export_safetensors.py' in words[1]:
            monkeypatch.setattr(sys, 'argv', words[1:])
            runpy.run_path(str(repo / words[1]), run_name='__main__')
        elif 'allocate_bits.py' in words[1]:
            few = ('--batches', '1', '--candidates', '3', '8')
            small = (*SMALL_DETECTOR, *SMALL_RUN, *SMALL_SET)
            monkeypatch.setattr(sys, 'argv', [*words[1:], *few, '--cfg-options', *small])
            runpy.run_path(str(repo / words[1]), run_name='__main__')
        elif 'calibrate_scores.py' in words[1]:
            # There is no run with 4-bit activations here.
            arguments = [word.replace('_w4a4', '_w4a8') for word in words[1:]]
            monkeypatch.setattr(sys, 'argv', [*arguments, *SMALL_DETECTOR, *SMALL_RUN, *SMALL_SET])
            runpy.run_path(str(repo / words[1]), run_name='__main__')
        else:
            # The command for several processes is not run; one process runs the same module above.
            assert words[:4] == ['python', '-m', 'torch.distributed.run', '--nproc_per_node']
            assert words[5:8] == ['-m', 'mmzsq.train', 'my_detector_w4a8.py']
        if (out / 'epoch_2.pth').exists() and not (out / LAST).exists():
            (out / 'epoch_2.pth').rename(out / LAST)
            (out / 'last_checkpoint').write_text(str(out / LAST))
        done.append(words[2])
    assert set(TOOLS) < set(done)
    assert (site / 'work_dirs/look/gallery.png').is_file()
    rehearsal = json.loads((site / 'work_dirs/my_detector_w4a8/rehearsal/rehearsal.json').read_text())
    assert {check['name'] for check in rehearsal['checks'] if check['status'] == 'ran'} == {
        *('images', 'feature prior', 'quantizers', 'training', 'evaluation', 'export')
    }
    assert (site / 'my_detector_w4a8.safetensors').is_file()
    assert (site / 'calibrated.pth').is_file()
    assert json.loads((site / 'deploy.json').read_text())['passed'] is True
    sizes = [
        json.loads((site / f'work_dirs/my_detector_{name}/results.json').read_text())
        for name in ('mixed', 'allocated', 'w4a8')
    ]
    assert all(of['model_mb']['quantized'] <= sizes[-1]['model_mb']['quantized'] for of in sizes)
    assert set(json.loads((out / 'results.json').read_text())['metrics']) == {'float', 'ptq', 'zero_shot'}
    named = set(re.findall(r'^\| `([^`]+)` \| ', GUIDE.read_text().split('## 6')[1].split('## 7')[0], re.M))
    assert named == {'results.json', 'quantization_report.json', LAST, 'ptq.pth', 'calibration_set/'}
    assert all((out / name).exists() for name in named)

    code = (site / 'use_it.py').read_text().replace("'my_detector_w4a8.py')", "'small.py')")
    overlay = dict(_options(SMALL_DETECTOR))
    small = Config.fromfile('my_detector_w4a8.py')
    small.merge_from_dict(overlay)
    small.dump('small.py')
    (site / 'use_it.py').write_text(code)
    assert len(runpy.run_path('use_it.py')['found'].bboxes) > 0


def test_the_commands_of_the_readme_run_in_order(
    run: Callable[[list[str]], None], site: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [leaf] = blocks('python', README)
    (site / 'my_detector_w4a8.py').write_text(leaf)
    shutil.copy('work_dirs/my_detector/epoch_12.pth', 'my_detector.pth')
    shutil.copytree('data/site/val', 'images')
    targets = re.findall(r'^([\w-]+):', (repo / 'Makefile').read_text(), re.M)
    extras = [path.stem for path in (repo / 'requirements').glob('*.txt')] + ['lite']
    out = site / 'work_dirs/my_detector_w4a8'
    for words in commands(README):
        if words[0] == 'make':
            assert words[1] in targets
        elif words[:2] == ['pip', 'install']:
            assert all(extra in extras for extra in re.findall(r'\w+', words[2]))
        elif '--rehearse' in words:
            # The test above runs it.
            assert words in commands()
        elif words[2] == 'mmzsq.quantize':
            # tests/test_quantize.py runs the command with a file. Here, it starts to read one.
            with pytest.raises(UserError, match=f'{words[3]} does not exist'):
                quantize.main(words[3:])
        elif words[2] == 'mmzsq.predict':
            monkeypatch.setattr(sys, 'argv', words[2:])
            cli.run(predict.main)
        else:
            run(words)
        if (out / 'epoch_2.pth').exists() and not (out / LAST).exists():
            (out / 'epoch_2.pth').rename(out / LAST)
    assert (out / 'report.html').is_file()
    assert json.loads((site / 'deploy.json').read_text())['passed'] is True
    assert len(list((site / 'work_dirs/predictions').glob('*.jpg'))) == 2


def test_messages_in_the_guide_match_the_package(repo: Path) -> None:
    table = GUIDE.read_text().split('## Messages')[1]
    messages = [row.split('|')[1].strip() for row in table.splitlines() if row.startswith('| ')][2:]
    assert len(messages) == 14
    source = ' '.join(path.read_text() for path in (repo / 'mmzsq').rglob('*.py'))
    joined = re.sub(r"['\"]\s*\n?\s*f?['\"]", '', source)
    for message in messages:
        # `nan` in the guide is a placeholder of the message.
        pattern = re.escape(message).replace('nan', r'\{loss\}')
        assert re.search(pattern, joined), message
