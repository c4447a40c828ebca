# SPDX-License-Identifier: Apache-2.0
"""Wrong inputs of every section of a config, every tool and every file that a tool reads."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from wrong_cases import FLOAT, OF_A_FILE, Prepare, Wrong, command, leaf, options

from mmzsq.checkpoint import load_from_mmzsq
from mmzsq.datasets.shapes_drawing import CLASS_NAMES as CLASSES

TEACHER = 'mmzsq://yolov5-p_shapes.safetensors'

# Values of the zsq section, given on the command line.

QUANTIZER = options(
    'train',
    {
        'zsq.quantizer': ['5', 'w4a8'],
        'zsq.quantizer.type': ['mmzsq.Nope', '5'],
        'zsq.quantizer.w_bits': ['0', '1', '9', '-4', '4.5', 'four', 'True', 'None', '[4,4]'],
        'zsq.quantizer.a_bits': ['1', '16', '1e1', 'x'],
        'zsq.quantizer.weight': ['x'],
        'zsq.quantizer.weight.scheme': ['unsigned', 'offset'],
        'zsq.quantizer.weight.per_channel': ['yes', '1'],
        'zsq.quantizer.weight.init': ['mean'],
        'zsq.quantizer.weight.narrow': ['5'],
        'zsq.quantizer.activation': ['3'],
        'zsq.quantizer.activation.scheme': ['symmetric', 'None'],
        'zsq.quantizer.activation.init': ['minmax'],
        'zsq.quantizer.step': ['exp', '1'],
        'zsq.quantizer.grad_scale': ['often', '0.5'],
        'zsq.quantizer.first_bits': ['1', 'eight'],
        'zsq.quantizer.last_bits': ['9', 'True'],
        'zsq.quantizer.equalize': ['yes', '2'],
        'zsq.quantizer.scope': ['[]', '5'],
        'zsq.quantizer.attention': ['1', 'x'],
        'zsq.quantizer.outputs': ['1', '12', 'x'],
        'zsq.quantizer.target': ['tflite', '8'],
        'zsq.quantizer.skip': ['5'],
        'zsq.quantizer.overrides': ['8', '[neck]'],
        'zsq.quantizer.overrides.neck': ['1', 'x'],
        'zsq.quantizer.allocate': ['x', '5'],
    },
)
CALIBRATION_SET = options(
    'train',
    {
        'zsq.calibration_set': ['None', '100'],
        'zsq.calibration_set.num_images': ['0', '-1', 'many', '2.5', 'None', 'True'],
        'zsq.calibration_set.batch_size': ['0', '-2', 'x'],
        'zsq.calibration_set.seed': ['-1', 'abc', '4294967296', '1.5', 'None'],
        'zsq.calibration_set.dir': ['5', '[a]'],
        'zsq.calibration_set.source': ['real', 'None', '1'],
        'zsq.calibration_set.real': ['x', '5', '[a]'],
    },
)
SAMPLER = options(
    'train',
    {
        'zsq.label_sampler': ['None', 'adaptive'],
        'zsq.label_sampler.warmup': ['-1', 'x', '1.5'],
        'zsq.label_sampler.interval': ['0', '-3', 'x'],
        'zsq.label_sampler.score_thr': ['2', '-0.1', 'x'],
        'zsq.label_sampler.add_iou': ['2', 'x'],
        'zsq.label_sampler.remove_iou': ['-1', 'None'],
        'zsq.label_sampler.area': ['[0.5,0.2]', 'x', '[0.1]'],
        'zsq.label_sampler.start': ['5'],
        'zsq.label_sampler.start.num_boxes': ['[5,1]', '0', '[-1,2]'],
        'zsq.label_sampler.start.side': ['[0,0.5]', 'x', '[0.5,0.1]', '[0.5,2]'],
        'zsq.label_sampler.start.type': ['mmzsq.Nope'],
        'zsq.label_sampler.type': ['5', 'mmzsq.Nope'],
        'zsq.label_sampler.warmpu': ['5'],
    },
)
SYNTHESIS = options(
    'train',
    {
        'zsq.synthesis': ['None', '[1]'],
        'zsq.synthesis.relabel': ['x', '5', '[5]'],
        'zsq.synthesis.relabel.image_size': ['0', '-64', 'large', '1.5', '[64]', '[64,0]'],
        'zsq.synthesis.relabel.iterations': ['-1', 'x', '0', '1.5', 'None'],
        'zsq.synthesis.relabel.batch_size': ['0', '-2', 'x'],
        'zsq.synthesis.relabel.lr': ['0', '-1', 'x'],
        'zsq.synthesis.relabel.start': ['zeros', 'None'],
        'zsq.synthesis.refine': ['x', '[None]'],
        'zsq.synthesis.synthesize': ['None', '5', '[a]'],
        'zsq.synthesis.synthesize.image_size': ['0', '0.5', '-1', 'x'],
        'zsq.synthesis.synthesize.iterations': ['-1', 'None'],
        'zsq.synthesis.fit_batches': ['2', 'x'],
        'zsq.synthesis.priors': ['x', '5', '[None]', '[TotalVariationPrior]'],
        'zsq.synthesis.require_feature_prior': ['maybe'],
        'zsq.synthesis.balance': ['1.5', 'x'],
        'zsq.synthesis.detection_weight': ['-1', 'x', 'None', 'nan', 'inf'],
        'zsq.synthesis.detection_reduction': ['max'],
        'zsq.synthesis.detection_interval': ['0', 'x'],
        'zsq.synthesis.lr': ['0', '-1', 'fast', 'nan', 'inf', 'None'],
        'zsq.synthesis.warmup': ['-1', 'x', '0.5'],
        'zsq.synthesis.betas': ['[0.9]', 'x', '[1,0.9]', '[0.9,-0.1]'],
        'zsq.synthesis.init': ['zeros'],
        'zsq.synthesis.cutout': ['yes', '0.5'],
        'zsq.synthesis.clamp': ['yes', '1'],
        'zsq.synthesis.keep': ['all'],
        'zsq.synthesis.keep_interval': ['0', 'x'],
        'zsq.synthesis.precision': ['fp16', '32'],
        'zsq.synthesis.capture': ['x'],
        'zsq.synthesis.itearations': ['5'],
    },
)
DISTILLATION = options(
    'train',
    {
        'zsq.distillation': ['5', 'None'],
        'zsq.distillation.detection_weight': ['-1', 'x', 'None', 'nan'],
        'zsq.distillation.losses': ['x', '[]', '[None]', '[PredictionLoss]'],
        'zsq.distillation.tau': ['1'],
    },
)
TRAIN = options(
    'train',
    {
        'zsq.train': ['None', '5'],
        'zsq.train.max_epochs': ['-1', '1.5', 'x', 'True', 'None'],
        'zsq.train.batch_size': ['0', '2.5', 'x'],
        'zsq.train.accumulate': ['0', 'x', '1.5'],
        'zsq.train.num_workers': ['-1', 'x'],
        'zsq.train.optimizer': ['Adam', '5'],
        'zsq.train.optimizer.lr': ['0', '-1', 'x', 'nan', 'inf', 'None'],
        'zsq.train.optimizer.type': ['AdmaW'],
        'zsq.train.step_lr': ['-1', 'x', 'inf'],
        'zsq.train.schedule': ['cosin', 'None', '5'],
        'zsq.train.final_lr_ratio': ['2', '-0.1', 'x'],
        'zsq.train.bn': ['frozn', 'True'],
        'zsq.train.ema': ['True', '1', '2', '-0.5', 'x'],
        'zsq.train.clip_grad': ['-1', 'x', 'nan'],
        'zsq.train.amp': ['maybe', '2'],
        'zsq.train.init_batches': ['0', 'x'],
        'zsq.train.capture': ['maybe'],
        'zsq.train.augmentation': ['5', 'flip'],
        'zsq.train.augmentation.flip': ['2', '-1', 'x'],
        'zsq.train.augmentation.mosaic': ['1.1'],
        'zsq.train.augmentation.color': ['3', 'x'],
        'zsq.train.augmentation.colour': ['0.1'],
        'zsq.train.image_size': ['0', 'large', '[640]', '[640,480.0]', '7'],
        'zsq.train.channels_last': ['maybe'],
        'zsq.train.epochs': ['5'],
    },
)
SECTION = [
    *options(
        'train',
        {
            'zsq.preset': ['papper', '5', 'None', '[paper]'],
            'zsq.presets': ['paper', '5'],
            'zsq.presets.defalt': ['paper'],
            'zsq.presets.default': ['papper'],
            'zsq.presets.paper.trian': ['5'],
            'zsq.teacher': ['5', '[a,b]'],
            'zsq.teacherr': ['a.pth'],
            'zsq.composed': ['True'],
            'zsq': ['5', 'None', '[]', 'w4a8'],
        },
    ),
    leaf(
        'scope that matches nothing',
        "zsq = dict(quantizer=dict(scope='no_such'))",
        "zsq.quantizer: the pattern 'no_such'",
    ),
    leaf(
        'skip that matches nothing',
        "zsq = dict(quantizer=dict(skip=['no_such']))",
        "zsq.quantizer: the pattern 'no_such'",
    ),
    leaf(
        'override that matches nothing',
        "zsq = dict(quantizer=dict(overrides={'no_such': 8}))",
        "zsq.quantizer: the pattern 'no_such'",
    ),
    leaf(
        'optimizer with coefficients above one',
        'zsq = dict(train=dict(optimizer=dict(betas=(2, 0.9))))',
        'zsq.train.optimizer',
        remedy='Invalid beta parameter',
    ),
    leaf(
        'optimizer with an unknown argument',
        'zsq = dict(train=dict(optimizer=dict(momentumm=0.9)))',
        'zsq.train.optimizer',
        remedy="unexpected keyword argument 'momentumm'",
    ),
    leaf('zsq is deleted', 'zsq = None', 'zsq'),
    leaf('quantizer with a number as key', 'zsq = dict(quantizer={1: 2})', 'zsq.quantizer'),
    leaf('train with a tuple as key', 'zsq = dict(train={(1, 2): 3})', 'zsq.train'),
    leaf(
        'candidates without an entry', 'zsq = dict(quantizer=dict(allocate=dict(candidates=[])))', 'zsq.quantizer.alloc'
    ),
    leaf(
        'candidates of one bit', 'zsq = dict(quantizer=dict(allocate=dict(candidates=[1, 2])))', 'allocate.candidates'
    ),
    leaf('budget of memory', "zsq = dict(quantizer=dict(allocate=dict(budget='memory')))", 'allocate.budget'),
    leaf('no batch for the allocation', 'zsq = dict(quantizer=dict(allocate=dict(batches=0)))', 'allocate.batches'),
    leaf('cutout with swapped areas', 'zsq = dict(synthesis=dict(cutout=dict(area=(0.5, 0.2))))', 'cutout.area'),
    leaf('cutout above one', 'zsq = dict(synthesis=dict(cutout=dict(probability=2)))', 'cutout.probability'),
    leaf('cutout of a word', "zsq = dict(synthesis=dict(cutout=dict(value='grey')))", 'cutout.value'),
    leaf('prior without a type', 'zsq = dict(synthesis=dict(priors=[dict(weight=1.0)]))', 'priors[0]'),
    leaf(
        'prior with a text as weight',
        "zsq = dict(synthesis=dict(priors=[dict(type='mmzsq.TotalVariationPrior', weight='x')]))",
        'zsq.synthesis.priors[0]',
    ),
    leaf(
        'prior with an unknown argument',
        "zsq = dict(synthesis=dict(priors=[dict(type='mmzsq.TotalVariationPrior', wieght=1)]))",
        'zsq.synthesis.priors[0]',
    ),
    leaf(
        'prior of another kind',
        "zsq = dict(synthesis=dict(priors=[dict(type='mmzsq.PredictionLoss')]))",
        'zsq.synthesis.priors[0]',
    ),
    leaf(
        'prior with a wrong form',
        "zsq = dict(synthesis=dict(priors=[dict(type='mmzsq.BNStatisticsPrior', form='l3')]))",
        'zsq.synthesis.priors[0]',
    ),
    leaf('loss of another kind', "zsq = dict(distillation=dict(losses=[dict(type='mmdet.FocalLoss')]))", 'losses[0]'),
    leaf(
        'loss with a text as weight',
        "zsq = dict(distillation=dict(losses=[dict(type='mmzsq.PredictionLoss', loss_weight='x')]))",
        'losses[0]',
    ),
    leaf(
        'loss with a negative weight',
        "zsq = dict(distillation=dict(losses=[dict(type='mmzsq.PredictionLoss', loss_weight=-1)]))",
        'losses[0]',
    ),
    leaf(
        'temperature of zero',
        "zsq = dict(distillation=dict(losses=[dict(type='mmzsq.PredictionKLLoss', tau=0)]))",
        'losses[0]',
    ),
    leaf(
        'loss of modules that the detector lacks',
        "zsq = dict(distillation=dict(losses=[dict(type='mmzsq.FeatureMSELoss', modules=['no_such'])]))",
        'no_such',
    ),
    leaf(
        'sampler without its annotation file',
        "zsq = dict(label_sampler=dict(_delete_=True, type='mmzsq.RealLabelSampler', ann_file='no.json'))",
        'no.json',
    ),
    leaf(
        'sampler without an argument that it needs',
        "zsq = dict(label_sampler=dict(_delete_=True, type='mmzsq.RealLabelSampler'))",
        'zsq.label_sampler',
    ),
    leaf(
        'augmentation of images whose labels are read',
        'zsq = dict(distillation=dict(detection_weight=1.0), train=dict(augmentation=dict(flip=1.0)))',
        'zsq.train.augmentation',
    ),
    leaf(
        'optimizer of a misspelled type',
        "zsq = dict(train=dict(optimizer=dict(type='AdmaW', lr=1e-3)))",
        "'AdmaW'",
    ),
    leaf(
        'optimizer whose type is a number',
        'zsq = dict(train=dict(optimizer=dict(type=5, lr=1e-3)))',
        'zsq.train.optimizer.type',
    ),
    leaf(
        'optimizer of another type without a rate',
        "zsq = dict(train=dict(optimizer=dict(type='SGD')))",
        'zsq.train.optimizer',
    ),
    leaf(
        'real images of an unknown kind',
        "zsq = dict(calibration_set=dict(real=dict(type='NopeDataset')))",
        'zsq.calibration_set.real',
    ),
    leaf(
        'real images without an annotation file',
        "zsq = dict(calibration_set=dict(real=dict(type='CocoDataset', ann_file='no.json')))",
        'no.json',
    ),
    leaf(
        'real images whose steps have no type',
        "zsq = dict(calibration_set=dict(real=dict(type='CocoDataset', pipeline=[dict()])))",
        'zsq.calibration_set.real.pipeline',
    ),
]

# The detector's part of a config.

DETECTOR = [
    *options(
        'train',
        {
            'model': ['5', 'None', 'yolo'],
            'model.type': ['5'],
            'default_hooks.checkpoint': ['5'],
            'default_hooks': ['5'],
            'custom_hooks': ['5', '[None]', '[a]'],
            'val_dataloader': ['5'],
            'test_dataloader': ['x'],
            'train_dataloader': ['[]'],
            'randomness': ['5'],
            'randomness.seed': ['-1', 'x', '1.5'],
            'val_dataloader.dataset': ['5'],
            'val_dataloader.dataset.metainfo': ['5'],
            'work_dir': ['5'],
            'env_cfg': ['5'],
            'launcher': ['nope', '5'],
        },
    ),
    leaf('no neck', 'model = dict(neck=None)', 'neck.'),
    leaf('an unknown detector', "model = dict(type='mmzsq.YOLOv9')", 'mmzsq.YOLOv9'),
    leaf('an unknown backbone', "model = dict(backbone=dict(type='mmzsq.Nope'))", 'mmzsq.Nope'),
    leaf('an unknown preprocessor', "model = dict(data_preprocessor=dict(type='Nope'))", 'Nope'),
    leaf('an unknown argument of a backbone', 'model = dict(backbone=dict(foo=1))', "'foo'"),
    leaf('a width in words', "model = dict(backbone=dict(widen_factor='x'))", 'model'),
    leaf('a number of classes in words', "model = dict(bbox_head=dict(num_classes='x'))", 'model'),
    leaf('another number of classes', 'model = dict(bbox_head=dict(num_classes=5))', 'num_classes'),
    leaf('no class', 'model = dict(bbox_head=dict(num_classes=0))', 'num_classes'),
    leaf(
        'names of too few classes', "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('a', 'b'))))", 'classes'
    ),
    leaf('an unknown custom hook', "custom_hooks = [dict(type='NopeHook')]", 'NopeHook'),
    leaf('a custom hook with a wrong argument', "custom_hooks = [dict(type='EmptyCacheHook', x=1)]", 'EmptyCacheHook'),
    leaf('an interval in words', "default_hooks = dict(logger=dict(interval='x'))", 'interval must be an integer'),
    leaf('an import that fails', "custom_imports = dict(imports=['no_such_module'])", 'no_such_module'),
    leaf('an import of a number', 'custom_imports = dict(imports=5)', 'case.py'),
    leaf(
        'a step of the pipeline that is not registered',
        "test_dataloader = dict(dataset=dict(pipeline=[dict(type='Nope')]))\nval_dataloader = test_dataloader",
        'Nope',
        tool='test',
        args=('out/epoch_2.pth',),
        needs='run',
    ),
    leaf(
        'an unknown metric',
        "test_evaluator = dict(_delete_=True, type='NopeMetric')",
        'NopeMetric',
        tool='test',
        args=('out/epoch_2.pth',),
        needs='run',
    ),
    leaf('no test_dataloader', 'test_dataloader = None', 'test_dataloader', tool='test', args=('x.pth',)),
    leaf('no test_evaluator', 'test_evaluator = None', 'test_evaluator', tool='test', args=('x.pth',)),
    leaf('no test_cfg', 'test_cfg = None', 'test_cfg', tool='test', args=('x.pth',)),
]

# Configs and command lines.

CONFIGS = [
    *(
        command(f'{tool} without its config', f'{tool} no_such.py {rest}', 'no_such.py', remedy='does not exist')
        for tool, rest in (('train', ''), ('test', 'x.pth'), ('generate', ''), ('export', 'x.pth'))
    ),
    *(
        command(f'config that is {what}', 'train wrong.py', 'wrong.py', files={'wrong.py': text}, **others)
        for what, text, others in (
            ('empty', '', {}),
            ('without a model', "default_scope = 'mmdet'\n", {}),
            ('not Python', 'model = dict(\n', dict(remedy='SyntaxError')),
            ('an essay', 'Dear reader, this is not a config.\n', dict(remedy='SyntaxError')),
            ('raising', "raise RuntimeError('my own')\n", dict(remedy='RuntimeError: my own')),
            ('without its base', "_base_ = 'no_base.py'\n", dict(remedy='no_base.py')),
            ('its own base', "_base_ = 'wrong.py'\n", dict(remedy='wrong.py')),
            ('without a known package', "_base_ = 'nope::a.py'\n", dict(remedy='please specify')),
        )
    ),
    command(
        'config without a known base of mmzsq',
        'train wrong.py',
        'zsq_w3a3x',
        files={'wrong.py': "_base_ = 'mmzsq::_base_/zsq_w3a3x.py'"},
    ),
    command(
        'config that is a folder',
        'train folder.py',
        'folder.py',
        prepare=lambda f: (f / 'folder.py').mkdir(),
        remedy='does not exist',
    ),
    command('config of another suffix', 'train tiny.txt', 'tiny.txt', files={'tiny.txt': 'x'}, remedy='[Oo]nly'),
    command('config as broken JSON', 'train tiny.json', 'tiny.json', files={'tiny.json': '{"model":'}, remedy='JSON'),
    command('config as a JSON list', 'train tiny.json', 'tiny.json', files={'tiny.json': '[1]'}, remedy=''),
    command(
        'config as a composed one',
        'train tiny.json --cfg-options zsq.train.max_epochs=3',
        'composed',
        files={'tiny.json': '{"model": {"type": "a"}, "zsq": {"composed": {"digest": "x", "config": "a.py"}}}'},
    ),
    command('no config', 'train', 'config', remedy='required'),
    command('unknown option', 'train tiny.py --resumed', '--resumed', remedy='unrecognized'),
    command('unknown launcher', 'train tiny.py --launcher horovod', '--launcher', remedy='choose from'),
    command('torchrun without torchrun', 'train tiny.py --launcher pytorch', '--launcher'),
    command('slurm without srun', 'train tiny.py --launcher slurm', '--launcher'),
    command('mpi without mpirun', 'train tiny.py --launcher mpi', '--launcher'),
    command('option without a value', 'train tiny.py --cfg-options zsq.train.max_epochs', 'zsq.train.max_epochs'),
    command('option without a key', 'train tiny.py --cfg-options =3', '=3'),
    command('option with an empty key', 'train tiny.py --cfg-options zsq..train=3', 'zsq..train'),
    command(
        'option with an open bracket',
        'train tiny.py --cfg-options zsq.train.image_size=[1,2',
        'image_size',
        remedy='Imbalanced brackets',
    ),
    command('option inside of a number', 'train tiny.py --cfg-options zsq.train.max_epochs.x=3', 'max_epochs'),
    command('option of a list by name', 'train tiny.py --cfg-options custom_hooks.x.y=3', 'custom_hooks'),
    command('option of a list beyond its end', 'train tiny.py --cfg-options custom_hooks.9.type=x', 'custom_hooks'),
    command('scaled rate of a section', 'train tiny.py --auto-scale-lr', '--auto-scale-lr'),
    command(
        'scaled rate without a batch',
        'train float.py --auto-scale-lr',
        'auto_scale_lr',
        files={'float.py': "model = dict(type='YOLOX')\n"},
    ),
    command(
        'amp without an optimizer', 'train float.py --amp', '--amp', files={'float.py': "model = dict(type='A')\n"}
    ),
    command('work_dir below a file', 'train tiny.py --work-dir file/sub', 'file/sub', files={'file': 'x'}),
    command('work_dir that is a file', 'train tiny.py --work-dir file', 'file', files={'file': 'x'}),
    command('resume from nowhere', 'train tiny.py --resume no.pth', 'no.pth'),
    command('resume from a float detector', f'train tiny.py --resume {TEACHER}', 'yolov5-p_shapes'),
    command('resume from text', 'train tiny.py --resume a.pth', 'a.pth', files={'a.pth': 'text'}, remedy=OF_A_FILE),
    command('resume without a run and a teacher', 'train tiny.py --resume --cfg-options load_from=None', 'zsq.teacher'),
    command('resume from ptq.pth', 'train tiny.py --resume out/ptq.pth', 'ptq.pth', needs='run'),
    command(
        'resume with other bits', 'train tiny.py --resume --cfg-options zsq.quantizer.w_bits=6', 'w_bits', needs='run'
    ),
    command(
        'set without a section', 'generate float.py', 'float.py', files={'float.py': "model = dict(type='YOLOX')\n"}
    ),
    command('neither config nor pictures', 'generate', '--procedural'),
    command('an unknown format', 'generate tiny.py --format tflite', 'tflite'),
    command('a folder without a format', 'generate tiny.py --format-dir a', '--format'),
    command('a format in a file', 'generate tiny.py --format npy --format-dir file', 'file', files={'file': 'x'}),
    command(
        'a format in a full folder',
        'generate tiny.py --format npy --format-dir full',
        'full',
        files={'full/mine.txt': 'x'},
    ),
    command('no pictures', 'generate --procedural 0', '--procedural'),
    command('fewer pictures than none', 'generate --procedural -1', '--procedural'),
    command('pictures in words', 'generate --procedural some', '--procedural', remedy='invalid int'),
    command('pictures and a config', 'generate tiny.py --procedural 3', '--procedural'),
    command('pictures and options of a config', 'generate --procedural 3 --cfg-options a=3', '--procedural'),
    command('pictures of no size', 'generate --procedural 3 --size 0', '--size'),
    command('pictures of three sides', 'generate --procedural 3 --size 1 2 3', '--size'),
    command('pictures of a negative size', 'generate --procedural 3 --size 64 -64', '--size'),
    command('pictures with a negative seed', 'generate --procedural 3 --size 64 --seed -1', '--seed'),
    command('pictures with a spread of zero', 'generate --procedural 3 --std 0 1 1', '--std'),
    command('pictures with a spread that is no number', 'generate --procedural 3 --std nan 1 1', '--std'),
    command('pictures with a mean that is no number', 'generate --procedural 3 --mean nan 1 1', '--mean'),
    command('pictures with two means', 'generate --procedural 3 --mean 1 2', '--mean', remedy='expected 3'),
    command('pictures in a file', 'generate --procedural 3 --size 64 --work-dir file', 'file', files={'file': 'x'}),
    command('size of a config', 'generate tiny.py --size 64', '--size'),
    command('spread of a config', 'generate tiny.py --std 1 1 1', '--std'),
]

# Checkpoints of the teacher.


def saved(content: Any, **options: Any) -> Prepare:
    return lambda folder: torch.save(content, folder / 'a.pth', **options)


def raw(content: bytes, name: str = 'a.pth') -> Prepare:
    return lambda folder: (folder / name).write_bytes(content)


class Gadget:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path('code_was_run'),))


def weights(change: Any) -> Prepare:
    """Write the weights of the shipped detector after ``change``."""

    def prepare(folder: Path) -> None:
        state = load_from_mmzsq(TEACHER)['state_dict']
        torch.save(change(state), folder / 'a.pth')

    return prepare


def truncated(share: float) -> Prepare:
    def prepare(folder: Path) -> None:
        content = io.BytesIO()
        torch.save(load_from_mmzsq(TEACHER), content)
        (folder / 'a.pth').write_bytes(content.getvalue()[: int(share * len(content.getvalue()))])

    return prepare


def archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / 'a.pth', 'w') as file:
        file.writestr('readme.txt', 'not a checkpoint')


def without_head(state: dict[str, Any]) -> Any:
    return dict(state_dict={k: v for k, v in state.items() if not k.startswith('bbox_head')})


def other_shape(state: dict[str, Any]) -> Any:
    return dict(state_dict={k: v[:1] if k.startswith('bbox_head') else v for k, v in state.items()})


FILES: list[tuple[str, Prepare]] = [
    ('empty', raw(b'')),
    ('text', raw(b'weights are elsewhere')),
    ('JSON', raw(b'{"state_dict": 5}')),
    ('zeros', raw(bytes(1000))),
    ('an image', raw(cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes())),
    ('a folder', lambda folder: (folder / 'a.pth').mkdir()),
    ('half of a file', truncated(0.5)),
    ('all but the end of a file', truncated(0.99)),
    ('an archive of other files', archive),
    ('a pickle of a list', raw(pickle.dumps([1, 2]))),
    ('a pickle of protocol 4', saved(dict(state_dict=5), pickle_protocol=4)),
    ('code', saved(dict(state_dict=Gadget()))),
    ('a list', saved([torch.zeros(2)])),
    ('nothing', saved(None)),
    ('a number', saved(5)),
    ('a tensor', saved(torch.zeros(2))),
    ('a file without weights', saved({})),
    ('weights that are None', saved(dict(state_dict=None))),
    ('weights that are a list', saved(dict(state_dict=[1]))),
    ('weights that are numpy arrays', saved(dict(state_dict=OrderedDict(a=1)))),
    ('no weight', saved(dict(state_dict={}))),
    ('weights of another detector', saved(dict(state_dict={'fc.weight': torch.zeros(3, 3)}))),
    ('weights without a head', weights(without_head)),
    ('weights of another shape', weights(other_shape)),
]
CHECKPOINTS = [
    *(
        command(
            f'teacher: {what}',
            'train tiny.py --cfg-options load_from=a.pth',
            'a.pth',
            prepare=prepare,
            remedy=OF_A_FILE,
        )
        for what, prepare in FILES
    ),
    *(
        command(
            f'teacher: {what} as safetensors',
            'train tiny.py --cfg-options load_from=a.safetensors',
            'a.safetensors',
            prepare=raw(content, 'a.safetensors'),
            remedy=OF_A_FILE,
        )
        for what, content in (
            ('empty', b''),
            ('text', b'hello'),
            ('a header too long', b'\xff' * 8 + b'{}'),
            ('a header without tensors', (2).to_bytes(8, 'little') + b'{}'),
            ('a header that is no JSON', (4).to_bytes(8, 'little') + b'{{{{'),
        )
    ),
    *(
        command(f'teacher at {where}', f'train tiny.py --cfg-options load_from={where}', named)
        for where, named in (
            ('nowhere.pth', 'nowhere.pth'),
            ('mmzsq://nowhere.safetensors', 'nowhere.safetensors'),
            ('s3://bucket/a.pth', 's3://bucket/a.pth'),
            ('open-mmlab://nope', 'open-mmlab://nope'),
            ('torchvision://nope', 'torchvision://nope'),
            ('http://127.0.0.1:9/a.pth', 'http://127.0.0.1:9/a.pth'),
            ('ftp://a/b.pth', 'ftp://a/b.pth'),
            ('5', 'load_from'),
            ('[a,b]', 'load_from'),
        )
    ),
    leaf('teacher as a dict', 'load_from = dict(path=1)', 'load_from'),
    leaf('no teacher', 'load_from = None', 'load_from'),
    command(
        'teacher that is a student',
        'train tiny.py --work-dir new --cfg-options load_from=out/epoch_2.pth',
        'epoch_2.pth',
        needs='run',
    ),
    command(
        'teacher of other classes',
        f'train tiny.py --cfg-options model.bbox_head.num_classes=3 load_from={TEACHER}',
        'num_classes',
    ),
    *(
        command(f'test: {what}', 'test tiny.py a.pth', 'a.pth', prepare=prepare, remedy=OF_A_FILE)
        for what, prepare in FILES
        if what in ('empty', 'text', 'half of a file', 'code', 'a list', 'weights of another detector', 'a folder')
    ),
    *(
        command(f'export: {what}', 'export tiny.py a.pth', 'a.pth', prepare=prepare, remedy=OF_A_FILE)
        for what, prepare in FILES
        if what in ('empty', 'text', 'half of a file', 'code', 'a list', 'weights of another detector', 'no weight')
    ),
    *(
        command(
            f'predict: {what}',
            'predict a.pth i.png --out p --config tiny.py',
            'a.pth',
            prepare=lambda folder, prepare=prepare: (prepare(folder), picture(folder)),
            remedy=OF_A_FILE,
        )
        for what, prepare in FILES
        if what in ('empty', 'text', 'half of a file', 'code', 'a list', 'weights of another detector', 'no weight')
    ),
    *(
        command(f'convert: {what}', 'convert a.pth b.safetensors', 'a.pth', prepare=prepare, remedy=OF_A_FILE)
        for what, prepare in FILES
        if what not in ('no weight', 'weights without a head', 'weights of another shape')
    ),
    *(
        command(
            f'export_safetensors: {what}',
            'export_safetensors a.pth b.safetensors',
            'a.pth',
            prepare=prepare,
            remedy=OF_A_FILE,
        )
        for what, prepare in FILES
        if what
        in ('empty', 'text', 'half of a file', 'code', 'a list', 'nothing', 'weights that are None', 'no weight')
    ),
    command('test: a float detector as a student', f'test tiny.py {TEACHER}', 'yolov5-p_shapes'),
    command('test: nowhere', 'test tiny.py no.pth', 'no.pth'),
    command(
        'test: other bits', 'test tiny.py out/epoch_2.pth --cfg-options zsq.quantizer.w_bits=8', 'w_bits', needs='run'
    ),
    command(
        'test: other classes',
        'test tiny.py out/epoch_2.pth --cfg-options model.bbox_head.num_classes=5',
        'epoch_2',
        needs='run',
    ),
    command(
        'test: a student as a float detector',
        'test float.py out/epoch_2.pth',
        'epoch_2.pth',
        needs='run',
        files={'float.py': FLOAT},
    ),
    command('test: --out of another suffix', 'test tiny.py a.pth --out a.json', '--out'),
    command('test: no exported file', 'test tiny.py no.onnx', 'no.onnx'),
    command('test: text as an exported file', 'test tiny.py a.onnx', 'a.onnx', prepare=raw(b'text', 'a.onnx')),
    command('test: a runtime of a checkpoint', 'test tiny.py a.pth --runtime openvino', '--runtime'),
    command('test: an unknown runtime', 'test tiny.py a.onnx --runtime tflite', '--runtime'),
]

# Predict, export and the converters.


def picture(folder: Path, name: str = 'i.png') -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((64, 64, 3), 90, np.uint8))


def two_of_one_name(folder: Path) -> None:
    picture(folder, 'a/i.png')
    picture(folder, 'b/i.png')


SHIPPED = f'predict {TEACHER}'
TOOLS = [
    command('no image', f'{SHIPPED} no.png --out p --config tiny.py', 'no.png'),
    command('an image of text', f'{SHIPPED} a.txt --out p --config tiny.py', 'a.txt', files={'a.txt': 'x'}),
    command(
        'a folder without images',
        f'{SHIPPED} a --out p --config tiny.py',
        'a has no images',
        files={'a/b.txt': 'x'},
        remedy=r'\.jpg',
    ),
    command(
        'a file as output',
        f'{SHIPPED} i.png --out file --config tiny.py',
        '--out',
        files={'file': 'x'},
        prepare=picture,
    ),
    command(
        'output among the images',
        f'{SHIPPED} a/i.png --out a --config tiny.py',
        '--out',
        prepare=lambda f: picture(f, 'a/i.png'),
    ),
    command('two images of one name', f'{SHIPPED} a b --out p --config tiny.py', 'i.png', prepare=two_of_one_name),
    command(
        'a score above one', f'{SHIPPED} i.png --out p --config tiny.py --score-thr 2', '--score-thr', prepare=picture
    ),
    command(
        'a score that is no number',
        f'{SHIPPED} i.png --out p --config tiny.py --score-thr nan',
        '--score-thr',
        prepare=picture,
    ),
    command(
        'a score in words',
        f'{SHIPPED} i.png --out p --config tiny.py --score-thr x',
        '--score-thr',
        prepare=picture,
        remedy='invalid float',
    ),
    command('no output', f'{SHIPPED} i.png --config tiny.py', '--out', prepare=picture),
    command(
        'predict without its config',
        f'{SHIPPED} i.png --out p --config no.py',
        'no.py',
        prepare=picture,
        remedy='does not exist',
    ),
    command('predict with a checkpoint alone', f'{SHIPPED} i.png --out p', '--config', prepare=picture),
    command(
        'predict with options alone', f'{SHIPPED} i.png --out p --cfg-options a=3', '--cfg-options', prepare=picture
    ),
    command('predict with no model', 'predict no.pth i.png --out p --config tiny.py', 'no.pth', prepare=picture),
    command('predict with no exported file', 'predict no.onnx i.png --out p', 'no.onnx', prepare=picture),
    command(
        'predict with a damaged file',
        'predict a.onnx i.png --out p',
        'a.onnx',
        prepare=lambda f: (picture(f), raw(b'x', 'a.onnx')(f)),
    ),
    command(
        'predict with a runtime',
        f'{SHIPPED} i.png --out p --config tiny.py --runtime openvino',
        '--runtime',
        prepare=picture,
    ),
    command(
        'predict with negative threads',
        'predict a.onnx i.png --out p --threads -1',
        '--threads',
        prepare=lambda f: (picture(f), raw(b'x', 'a.onnx')(f)),
    ),
    command(
        'predict beside nothing',
        'predict out/epoch_2.pth i.png --out p --config tiny.py --compare-with no.pth',
        'no.pth',
        prepare=picture,
        needs='run',
    ),
    command(
        'predict beside an unknown teacher',
        'predict out/epoch_2.pth i.png --out p --config tiny.py --cfg-options load_from=None --compare-with',
        '--compare-with',
        prepare=picture,
        needs='run',
    ),
    command('export of nothing', 'export tiny.py no.pth', 'no.pth', remedy='does not exist'),
    command(
        'export of a float detector', 'export tiny.py a.pth', 'a.pth', prepare=weights(lambda s: dict(state_dict=s))
    ),
    command('export for another target', 'export tiny.py a.pth --target tflite', 'tflite'),
    command('export to another suffix', 'export tiny.py a.pth --out a.bin', '--out'),
    command(
        'export to a file below a file',
        'export tiny.py out/epoch_2.pth --out file/a.onnx',
        'file/a.onnx',
        files={'file': 'x'},
        needs='run',
    ),
    command(
        'export to a folder',
        'export tiny.py out/epoch_2.pth --out a.onnx',
        'a.onnx',
        needs='run',
        prepare=lambda f: (f / 'a.onnx').mkdir(),
    ),
    command('export verified less than never', 'export tiny.py a.pth --verify -1', '--verify'),
    command('export with accuracy alone', 'export tiny.py a.pth --ap 5', '--ap'),
    command('export with negative accuracy', 'export tiny.py a.pth --verify 2 --ap -5', '--ap'),
    command('export of no size', 'export tiny.py out/epoch_2.pth --size 0 0', 'size is 0 0', needs='run'),
    command('export of a negative size', 'export tiny.py out/epoch_2.pth --size -64 64', 'size is -64 64', needs='run'),
    command('export of an odd size', 'export tiny.py out/epoch_2.pth --size 65 64', 'size is 65 64', needs='run'),
    command('export of one side', 'export tiny.py a.pth --size 64', '--size', remedy='expected 2'),
    command(
        'export by another exporter',
        'export tiny.py out/epoch_2.pth --size 64 64 --exporter tflite',
        'exporter',
        needs='run',
    ),
    command(
        'export of raw maps with NMS', 'export tiny.py out/epoch_2.pth --size 64 64 --raw --nms', 'nms', needs='run'
    ),
    command(
        'export of a config without a section',
        'export float.py a.pth',
        'zsq',
        prepare=raw(b'x'),
        files={'float.py': "model = dict(type='YOLOX')\n"},
    ),
    command(
        'export of other bits',
        'export tiny.py out/epoch_2.pth --cfg-options zsq.quantizer.w_bits=8',
        'w_bits',
        needs='run',
    ),
    command('convert to another suffix', 'convert a.pth b.onnx', 'b.onnx', prepare=raw(b'x')),
    command('convert nothing', 'convert no.pt b.safetensors', 'no.pt'),
    command('export_safetensors to another suffix', 'export_safetensors a.pth b.bin', 'b.bin', prepare=raw(b'x')),
    command('export_safetensors of nothing', 'export_safetensors no.pth b.safetensors', 'no.pth'),
    command(
        'export_safetensors without names',
        'export_safetensors a.pth b.safetensors',
        'a.pth',
        prepare=weights(lambda state: dict(state_dict=state)),
    ),
    command('VOC in no folder', 'voc_to_coco no --splits a --classes b', 'no/'),
    command('VOC without the split', 'voc_to_coco v --splits a --classes b --out o', 'a.txt', files={'v/x': 'x'}),
    command(
        'VOC without an annotation',
        'voc_to_coco v --splits a --classes b --out o',
        '1.xml',
        files={'v/ImageSets/Main/a.txt': '1\n'},
    ),
    command(
        'VOC with a broken annotation',
        'voc_to_coco v --splits a --classes b --out o',
        '1.xml',
        files={'v/ImageSets/Main/a.txt': '1\n', 'v/Annotations/1.xml': '<annotation>'},
        remedy='not a Pascal VOC',
    ),
    command(
        'VOC with an unknown class',
        'voc_to_coco v --splits a --classes b --out o',
        '--classes',
        files={
            'v/ImageSets/Main/a.txt': '1\n',
            'v/Annotations/1.xml': '<annotation><size><width>9</width><height>9'
            '</height></size><object><name>c</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5'
            '</ymax></bndbox></object></annotation>',
        },
    ),
    command('VOC without classes', 'voc_to_coco v --splits a', '--classes', files={'v/x': 'x'}),
]

# Calibration sets.


def changed_json(name: str, change: Any) -> Prepare:
    """Change the content of a JSON file of the set."""

    def prepare(folder: Path) -> None:
        path = folder / 'out/calibration_set' / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))

    return prepare


def overwritten(name: str, content: bytes) -> Prepare:
    return lambda folder: (folder / 'out/calibration_set' / name).write_bytes(content)


def used_set(what: str, prepare: Prepare, names: str, **others: Any) -> Wrong:
    return command(f'set: {what}', 'train tiny.py', names, needs='run', prepare=prepare, **others)


SETS = [
    used_set('other number of images', changed_json('manifest.json', lambda c: {**c, 'num_images': 4}), 'num_images'),
    used_set('another format', changed_json('manifest.json', lambda c: {**c, 'format': 'x'}), 'manifest.json'),
    used_set('another version', changed_json('manifest.json', lambda c: {**c, 'format_version': 99}), 'version 99'),
    used_set('manifest as a list', changed_json('manifest.json', lambda c: [c]), 'manifest.json'),
    used_set('another image', overwritten('images/000000.png', b'x'), '000000.png'),
    used_set('changed annotations', overwritten('annotations/instances.json', b'{}'), 'instances.json'),
    command(
        'set: other seed', 'train tiny.py --cfg-options zsq.calibration_set.seed=7', 'seed: 0 there, 7 now', needs='run'
    ),
    command(
        'set: other size',
        'generate tiny.py --cfg-options zsq.synthesis.synthesize.image_size=64',
        'image_size',
        needs='run',
    ),
    command(
        'set: in a folder of other files',
        'train tiny.py --cfg-options zsq.calibration_set.dir=mine',
        'zsq.calibration_set.dir',
        files={'mine/photo.txt': 'x'},
    ),
    command('set: in a file', 'train tiny.py --cfg-options zsq.calibration_set.dir=file', 'file', files={'file': 'x'}),
    command(
        'set: below a file',
        'generate tiny.py --cfg-options zsq.calibration_set.dir=file/a',
        'file/a',
        files={'file': 'x'},
    ),
    command(
        'set: of a size that the detector cannot take',
        'train tiny.py --cfg-options zsq.synthesis.synthesize.image_size=1',
        'zsq.synthesis.synthesize.image_size',
    ),
]

# Evaluation data.

COCO = """
custom = dict(type='CocoDataset', data_root='', ann_file='ann.json', data_prefix=dict(img='img/'), test_mode=True,
    metainfo=dict(classes={classes!r}), pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64),
    keep_ratio=True), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=('img_id',
    'img_path', 'ori_shape', 'img_shape', 'scale_factor'))])
test_dataloader = dict(dataset=dict(_delete_=True, **custom))
val_dataloader = test_dataloader
test_evaluator = dict(_delete_=True, type='CocoMetric', ann_file='ann.json', metric='bbox')
val_evaluator = test_evaluator
"""


def annotations(**changes: Any) -> dict[str, Any]:
    image = dict(id=1, file_name='a.png', width=64, height=64)
    box = dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0)
    categories = [dict(id=index, name=name) for index, name in enumerate(CLASSES, 1)]
    return {**dict(images=[image], annotations=[box], categories=categories), **changes}


def evaluation(
    what: str, content: Any, names: str, image: bytes | None = None, classes: Any = CLASSES, **others: Any
) -> list[Wrong]:
    """Make rows of evaluation data for test and for train, which must say so before work."""
    text = content if isinstance(content, str) else json.dumps(content)

    def prepare(folder: Path) -> None:
        picture(folder, 'img/a.png')
        if image is not None:
            (folder / 'img/a.png').write_bytes(image)
        if text:
            (folder / 'ann.json').write_text(text)

    return [
        leaf(
            f'evaluation: {what}',
            COCO.format(classes=classes),
            names,
            tool='test',
            args=('out/epoch_2.pth',),
            prepare=prepare,
            needs='run',
            **others,
        ),
        *(
            [
                leaf(
                    f'evaluation before training: {what}',
                    COCO.format(classes=classes),
                    names,
                    prepare=prepare,
                    **others,
                )
            ]
            if image is None and text
            else []
        ),
    ]


EVALUATION = [
    *evaluation('no annotation file', '', 'ann.json'),
    *evaluation('broken JSON', '{"images": [', 'ann.json'),
    *evaluation('a list', '[]', 'ann.json'),
    *evaluation('no categories', {'images': [], 'annotations': []}, 'ann.json'),
    *evaluation('no images', annotations(images=[], annotations=[]), 'dataloader'),
    *evaluation(
        'categories in another order',
        annotations(categories=[dict(id=9 - i, name=name) for i, name in enumerate(reversed(CLASSES), 1)]),
        'ann.json',
    ),
    *evaluation(
        'a class that is absent',
        annotations(categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES[:-1], 1)]),
        'stripes',
    ),
    *evaluation('other classes', annotations(categories=[dict(id=i, name=f'c{i}') for i in range(1, 9)]), 'disc'),
    *evaluation('a damaged image', annotations(), 'a.png', image=b'damaged'),
    *evaluation('an empty image', annotations(), 'a.png', image=b''),
    *evaluation('too few names', annotations(), 'classes', classes=('disc', 'ring')),
]


NOT_YET: dict[str, tuple[str, ...]] = {}
"""Rows that the product does not answer rightly, by reason."""

ROWS = [
    *QUANTIZER,
    *CALIBRATION_SET,
    *SAMPLER,
    *SYNTHESIS,
    *DISTILLATION,
    *TRAIN,
    *SECTION,
    *DETECTOR,
    *CONFIGS,
    *CHECKPOINTS,
    *TOOLS,
    *SETS,
    *EVALUATION,
]
REASONS = {name: reason for reason, names in NOT_YET.items() for name in names}
if unknown := REASONS.keys() - {row.name for row in ROWS}:
    raise ValueError(f'no rows of these names: {unknown}')

WRONG_INPUTS: list[Wrong] = [replace(row, fails=REASONS.get(row.name)) for row in ROWS]
