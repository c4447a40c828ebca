# SPDX-License-Identifier: Apache-2.0
"""Two processes generate the same set as one process, and train the same student."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from mmzsq.engine import QuantizerInitHook, ZeroShotRunner
from mmzsq.quantization import set_quantization
from mmzsq.synthesis import CalibrationSet
from tests.checkpoint_digest import digest_of_tensors

NO_EVALUATION = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
SIX_IMAGES = {'zsq.calibration_set.num_images': 6}
"""Three shards: one process makes one more than the other."""
EXACT = {
    # Settings whose result does not depend on the distribution of images: no random numbers per process, no sampling.
    'zsq.train.augmentation': None,
    'zsq.quantizer.activation.init': 'lsq',
    'zsq.quantizer.equalize': False,
    # Adam would turn gradients that are only rounding errors into full steps.
    'zsq.train.optimizer': dict(_delete_=True, type='SGD', lr=1e-3),
    'zsq.train.step_lr': None,
}
AVERAGED = {
    'zsq.train.bn': 'train',
    'zsq.train.ema': 0.99,
    'zsq.quantizer.allocate': dict(candidates=[2, 3, 4, 5, 6], batches=1),
}


def smooth(student: Any) -> None:
    """Replace the rounding of a student by noise in its weights, so that results can be compared to many digits.

    Convolutions of one and of two images differ in the seventh digit. This is enough to round a value to another level,
    which changes later results by percents.
    """
    set_quantization(student, False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)


SCRIPT = (
    f"""
import torch
from typing import Any
from mmzsq.quantization import set_quantization

{inspect.getsource(smooth)}
"""
    + """
import datetime
import os
import time
import torch
import mmzsq
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmzsq import cli
from mmzsq.qat import captured_step
from mmzsq.qat.captured_step import CapturedStep
from mmzsq.distillation.divergence import soft_object_count
from mmzsq.engine import QuantizerInitHook, ZeroShotRunner
from mmzsq.engine.distributed import average_gradients
from mmzsq.quantization import quantizers
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator

# Without its layout, which takes seconds.
Config.pretty_text = property(lambda cfg: '')
initialize = QuantizerInitHook.before_train
write_shard = CalibrationSet.write_shard
make_shards = CalibrationSetGenerator.generate

def before_train(self, runner):
    initialize(self, runner)
    if os.path.basename(runner.work_dir) == 'two':
        smooth(runner.detector.student)
    torch.save(runner.detector.state_dict(), f'{runner.work_dir}/first_{get_rank()}.pth')
    file = f'{runner.work_dir}/bits_{get_rank()}.pth'
    if not os.path.exists(file):
        # A run that goes on has those of the checkpoint.
        torch.save({name: q.bits for name, q in quantizers(runner.detector.student)}, file)

def train(runner):
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    averages = [hook.ema_model.state_dict() for hook in runner.hooks if hasattr(hook, 'ema_model')]
    last = dict(state=runner.detector.state_dict(), losses=torch.tensor(losses), averages=averages)
    torch.save(last, f'{runner.work_dir}/last_{get_rank()}.pth')

class Interrupted(Exception):
    pass

def interrupt_shards(self, index, *args):
    # Of shards 0 and 2 of the first process and 1 of the second, the first alone is written.
    if index:
        raise Interrupted
    write_shard(self, index, *args)

def impatient(self, *args):
    # Processes that wait for each other give up after a second, as with NCCL they would after ten minutes.
    make_shards(self, *args)
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), torch.distributed.group.WORLD)
    time.sleep(2.5 * get_rank())

def interrupt_training(self, runner):
    if runner.epoch == 1:
        raise Interrupted

class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(1.0)) for _ in range(3)])

    def forward(self, inputs, data_samples, mode):
        return dict(loss=self.weights[0] * inputs.mean())

class Graph:
    # Writes where a captured step would.
    def __init__(self, step):
        self.step = step

    def replay(self):
        self.step.grads[0].copy_(self.step.inputs.mean())

rank = int(os.environ['RANK'])
QuantizerInitHook.before_train = before_train
two = Config.fromfile('two.py')
CalibrationSet.write_shard = interrupt_shards
try:
    cli.build_runner(two).generate()
except Interrupted:
    CalibrationSet.write_shard = write_shard
CalibrationSetGenerator.generate = impatient
ZeroShotRunner.from_cfg(two).generate()
CalibrationSetGenerator.generate = make_shards
torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=5), torch.distributed.group.WORLD)
train(ZeroShotRunner.from_cfg(two))

averaged = Config.fromfile('averaged.py')
QuantizerInitHook.before_train_epoch = interrupt_training
try:
    ZeroShotRunner.from_cfg(averaged).train()
except Interrupted:
    del QuantizerInitHook.before_train_epoch
# The first process writes the checkpoint, while the second is here already.
torch.distributed.barrier()
averaged.resume, averaged.load_from = True, None
train(ZeroShotRunner.from_cfg(averaged))
# The same without the interruption.
train(ZeroShotRunner.from_cfg(Config.fromfile('whole.py')))

# Of three weights one has gradients in both processes, one in the second, one in none.
model = Line()
model.weights[0].grad = torch.tensor(1.0 + 2 * rank)
model.weights[1].grad = torch.tensor(4.0) if rank else None
average_gradients(model)
gradients = [w.grad for w in model.weights]

# Of a layer in another layout, which the optimizer expects of its gradient.
layer = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
own = torch.arange(108.0).view(4, 3, 3, 3) * (1 + 2 * rank)
layer.weight.grad = own.contiguous(memory_format=torch.channels_last)
average_gradients(layer)

step, model = CapturedStep(), Line()
captured_step._can_capture = lambda *args: True
step.graph, step.inputs, step.log_vars = Graph(step), torch.zeros(1), {}
step.parameters, step.grads = [model.weights[0]], [torch.zeros(())]
optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
for value in (1.0 + rank, 3.0 - rank):
    step(model, dict(inputs=torch.full((1,), value), data_samples=[]), optim_wrapper, True, average_gradients)
numbers = [float(soft_object_count(torch.full((2,), value))) for value in (1.0 + rank, 0.1)]
units = dict(numbers=numbers, gradients=gradients, layer=layer.weight.grad, replayed=model.weights[0].detach())
torch.save(units, f'units_{rank}.pth')
# As the command line tools do.
torch.distributed.destroy_process_group()
"""
)


def set_content(work_dir: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files of a complete set, and its manifest without times."""
    calibration_set = CalibrationSet.load(work_dir / 'calibration_set')
    manifest = calibration_set.manifest
    assert manifest is not None
    for shard in manifest['shards']:
        for stage in shard['info'].values():
            del stage['seconds'], stage['ms_per_image_iteration']
    files = [*calibration_set.root.glob('images/*'), *calibration_set.root.glob('annotations/*')]
    return {path.name: path.read_bytes() for path in files}, manifest


@pytest.fixture(scope='module')
def root(configure: Any, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs: ``one`` by one process, ``two``, the same by two, and ``averaged``, another by two."""
    root = tmp_path_factory.mktemp('distributed')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', property(lambda cfg: repr(cfg)))
        initialize = QuantizerInitHook.before_train

        def before_train(hook: QuantizerInitHook, runner: ZeroShotRunner) -> None:
            initialize(hook, runner)
            smooth(runner.detector.student)

        patch.setattr(QuantizerInitHook, 'before_train', before_train)
        options = {**NO_EVALUATION, **SIX_IMAGES}
        runner = ZeroShotRunner.from_cfg(configure(root / 'one', **options, **EXACT))
        runner.train()
        losses = torch.tensor(runner.message_hub.get_scalar('train/loss').data[0])
        torch.save(dict(state=runner.detector.state_dict(), losses=losses), root / 'one' / 'last.pth')
    shared = {'zsq.calibration_set.dir': str(root / 'averaged' / 'calibration_set')}
    for name, changes in (('two', EXACT), ('averaged', AVERAGED), ('whole', {**AVERAGED, **shared})):
        cfg = configure(root / name, **options, **changes, **{'zsq.train.batch_size': 1})
        cfg.launcher = 'pytorch'
        (root / f'{name}.py').write_text(''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items()))
    (root / 'script.py').write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=str(repo), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return root


def of_ranks(root: Path, name: str) -> list[Any]:
    return [torch.load(root / f'{name}_{rank}.pth', weights_only=True) for rank in (0, 1)]


def assert_same(states: list[dict[str, torch.Tensor]]) -> None:
    one, two = states
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_two_interrupted_processes_generate_the_same_set_as_one(root: Path) -> None:
    """The process with one more shard may take longer than the usual timeout between processes."""
    for two, one in zip(set_content(root / 'two'), set_content(root / 'one'), strict=True):
        assert two == one
    assert set_content(root / 'averaged') == set_content(root / 'one')


def test_two_processes_train_the_same_student_as_one_with_the_same_batch(root: Path) -> None:
    one = torch.load(root / 'one' / 'last.pth', weights_only=True)
    two = of_ranks(root / 'two', 'last')
    # Three steps in each of two epochs; the processes share the images of a step.
    assert len(one['losses']) == 6
    torch.testing.assert_close((two[0]['losses'] + two[1]['losses']) / 2, one['losses'], rtol=1e-5, atol=1e-5)
    assert not torch.equal(two[0]['losses'], two[1]['losses'])
    assert two[0]['state'].keys() == one['state'].keys()
    moved = 0.0
    first = of_ranks(root / 'two', 'first')[0]
    for name, value in one['state'].items():
        torch.testing.assert_close(two[0]['state'][name], value, rtol=1e-5, atol=1e-6)
        moved = max(moved, float((value.double() - first[name].double()).abs().max()))
    assert moved > 1e-4
    images = [json.loads((root / name / 'results.json').read_text())['train']['images'] for name in ('one', 'two')]
    assert images == [12, 12]


@pytest.mark.parametrize('name', ['two', 'averaged'])
def test_steps_weights_statistics_and_averages_are_equal_on_all_ranks(root: Path, name: str) -> None:
    """With frozen BatchNorm, and with trained quantizers and BatchNorm, averaged weights and a resumed run."""
    first, last = (of_ranks(root / name, moment) for moment in ('first', 'last'))
    assert_same(first)
    assert_same([rank['state'] for rank in last])
    changed = [key for key in first[0] if not torch.equal(first[0][key], last[0]['state'][key])]
    assert changed
    assert any('_quantizer.' in key for key in changed) == (name == 'averaged')
    assert any('running_var' in key for key in changed) == (name == 'averaged')
    # Each process measured layers on different images.
    bits = of_ranks(root / name, 'bits')
    assert bits[0] == bits[1]
    assert (len(set(bits[0].values())) > 2) == (name == 'averaged')
    averages = [rank['averages'] for rank in last]
    assert len(averages[0]) == (name == 'averaged')
    for states in zip(*averages, strict=True):
        assert_same(list(states))


def test_two_interrupted_processes_end_with_the_bits_of_two_that_were_not(root: Path) -> None:
    """Each process augments its images in its own way, with averaged weights and allocated bits."""
    resumed, whole = (digest_of_tensors(root / name / 'epoch_2.pth') for name in ('averaged', 'whole'))
    assert resumed == whole


def test_soft_object_count_is_the_mean_over_processes_and_at_least_one_in_total(root: Path) -> None:
    for units in of_ranks(root, 'units'):
        # (2 + 4) / 2, and 1 / 2 instead of (0.2 + 0.2) / 2.
        assert units['numbers'] == [3.0, 0.5]


def test_a_missing_gradient_of_one_process_counts_as_zeros(root: Path) -> None:
    for units in of_ranks(root, 'units'):
        assert units['gradients'] == [2.0, 2.0, None]
        assert torch.equal(units['layer'], 2 * torch.arange(108.0).view(4, 3, 3, 3))
        assert units['layer'].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_averaged_after_a_captured_step(root: Path) -> None:
    for units in of_ranks(root, 'units'):
        assert units['replayed'] == 1.0 - 1.5 - 2.5
