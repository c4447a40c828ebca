# SPDX-License-Identifier: Apache-2.0
"""Train a detector, or quantize one without data if the config has a ``zsq`` section.

``python -m mmzsq.train CONFIG`` has the options of MMDetection's ``tools/train.py`` and runs its configs. Bases may be
named ``mmzsq::...`` too, because this package is imported before the config is read. ``--rehearse`` runs all stages
at toy size first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.config import Config

from mmzsq import cli
from mmzsq.engine.rehearsal import rehearse
from mmzsq.errors import NotEvaluatedError, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train.

    Args:
        arguments: The command line, None: that of the process.
    """
    args = _parse_args(arguments)
    if args.rehearse and args.resume is not None:
        raise UserError('--rehearse starts from the teacher: leave out --resume')
    cfg = cli.load_config(args)
    if args.amp:
        _enable_amp(cfg)
    if args.auto_scale_lr:
        _enable_auto_scale_lr(cfg)
    if args.resume is not None:
        cli.name_teacher(cfg)
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.rehearse:
        failed = rehearse(cfg, cli.build_runner).not_evaluated
    else:
        runner = cli.build_runner(cfg)
        runner.train()
        failed = getattr(runner, 'not_evaluated', None)
    if isinstance(failed, str):
        raise NotEvaluatedError(failed)


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = cli.parser('Train a detector, or quantize one if the config has a zsq section.')
    options.add_argument('--amp', action='store_true', help='train in mixed precision')
    options.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the number of processes (not of a zsq section)',
    )
    options.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint, or from the last one in the work directory',
    )
    options.add_argument(
        '--rehearse',
        action='store_true',
        help='run all stages of a zsq section at toy size in WORK_DIR/rehearsal, and say what they exercised and what '
        'the whole run will take',
    )
    return options.parse_args(arguments)


def _enable_amp(cfg: Config) -> None:
    if 'zsq' in cfg:
        cfg.merge_from_dict({'zsq.train.amp': True})
    elif 'optim_wrapper' in cfg:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    else:
        raise UserError('--amp needs a config with an optim_wrapper')


def _enable_auto_scale_lr(cfg: Config) -> None:
    if 'zsq' in cfg:
        raise UserError('--auto-scale-lr is not for a zsq section: set zsq.train.optimizer.lr')
    scaling = cfg.get('auto_scale_lr')
    if scaling is None or 'base_batch_size' not in scaling:
        raise UserError(
            'set the batch size that the learning rate was chosen for, to scale it by: '
            'auto_scale_lr = dict(base_batch_size=...)'
        )
    scaling.enable = True


if __name__ == '__main__':
    cli.run(main)
