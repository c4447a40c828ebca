# SPDX-License-Identifier: Apache-2.0
"""Training in two processes: both end with the same student."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = """
import torch
import mmzsq
from mmengine.config import Config
from mmengine.dist import get_rank
from mmzsq import cli
from mmzsq.engine import QuantizerInitHook

# Without its layout, which takes seconds.
Config.pretty_text = property(lambda cfg: '')
initialise = QuantizerInitHook.before_train

def before_train(self, runner):
    initialise(self, runner)
    torch.save(runner.detector.state_dict(), f'first_{get_rank()}.pth')

QuantizerInitHook.before_train = before_train
runner = cli.build_runner(Config.fromfile('config.py'))
runner.train()
torch.save(runner.detector.state_dict(), f'last_{get_rank()}.pth')
"""


def test_steps_and_weights_are_equal_on_all_ranks(make_config: Any, tmp_path: Path, repo: Path) -> None:
    cfg = make_config('out', **{f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')})
    cfg.launcher = 'pytorch'
    cfg.dump('config.py')
    Path('script.py').write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=str(repo), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for moment in ('first', 'last'):
        one, two = (torch.load(f'{moment}_{rank}.pth', weights_only=True) for rank in (0, 1))
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    first = torch.load('first_0.pth', weights_only=True)
    assert any(not torch.equal(first[name], one[name]) for name in one if '_quantizer.log_step' in name)
