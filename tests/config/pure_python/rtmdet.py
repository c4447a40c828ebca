from mmcv.ops import nms
from mmcv.transforms.loading import LoadImageFromFile
from mmcv.transforms.processing import RandomResize
from mmdet.datasets.transforms.formatting import PackDetInputs
from mmdet.datasets.transforms.loading import LoadAnnotations
from mmdet.datasets.transforms.transforms import CachedMosaic, Pad, RandomCrop, RandomFlip, Resize, YOLOXHSVRandomAug
from mmdet.engine.hooks.pipeline_switch_hook import PipelineSwitchHook
from mmdet.models.backbones import CSPNeXt
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RTMDetSepBNHead
from mmdet.models.detectors import RTMDet
from mmdet.models.layers.ema import ExpMomentumEMA
from mmdet.models.losses.gfocal_loss import QualityFocalLoss
from mmdet.models.losses.iou_loss import GIoULoss
from mmdet.models.necks import CSPNeXtPAFPN
from mmdet.models.task_modules.assigners import DynamicSoftLabelAssigner
from mmdet.models.task_modules.coders import DistancePointBBoxCoder
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmengine.config import read_base
from mmengine.hooks.ema_hook import EMAHook
from mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import CosineAnnealingLR, LinearLR
from torch import nn
from torch.optim.adamw import AdamW

with read_base():
    from ._base_.coco_detection import *
    from ._base_.default_runtime import *
    from ._base_.schedule_1x import *

model = dict(
    type=RTMDet,
    data_preprocessor=dict(
        type=DetDataPreprocessor,
        mean=[103.53, 116.28, 123.675],
        std=[57.375, 57.12, 58.395],
        bgr_to_rgb=False,
        batch_augments=None,
    ),
    backbone=dict(
        type=CSPNeXt,
        arch='P5',
        expand_ratio=0.5,
        deepen_factor=0.167,
        widen_factor=0.375,
        channel_attention=True,
        norm_cfg=dict(type=nn.BatchNorm2d),
        act_cfg=dict(type=nn.SiLU, inplace=True),
    ),
    neck=dict(
        type=CSPNeXtPAFPN,
        in_channels=[96, 192, 384],
        out_channels=96,
        num_csp_blocks=1,
        expand_ratio=0.5,
        norm_cfg=dict(type=nn.BatchNorm2d),
        act_cfg=dict(type=nn.SiLU, inplace=True),
    ),
    bbox_head=dict(
        type=RTMDetSepBNHead,
        num_classes=80,
        in_channels=96,
        stacked_convs=2,
        feat_channels=96,
        anchor_generator=dict(type=MlvlPointGenerator, offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type=DistancePointBBoxCoder),
        loss_cls=dict(type=QualityFocalLoss, use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type=GIoULoss, loss_weight=2.0),
        with_objectness=False,
        exp_on_reg=False,
        share_conv=True,
        pred_kernel_size=1,
        norm_cfg=dict(type=nn.BatchNorm2d),
        act_cfg=dict(type=nn.SiLU, inplace=True),
    ),
    train_cfg=dict(
        assigner=dict(type=DynamicSoftLabelAssigner, topk=13), allowed_border=-1, pos_weight=-1, debug=False
    ),
    test_cfg=dict(
        nms_pre=30000, min_bbox_size=0, score_thr=0.001, nms=dict(type=nms, iou_threshold=0.65), max_per_img=300
    ),
)

train_pipeline = [
    dict(type=LoadImageFromFile, backend_args=backend_args),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=CachedMosaic, img_scale=(640, 640), pad_val=114.0),
    dict(type=RandomResize, scale=(1280, 1280), ratio_range=(0.5, 2.0), resize_type=Resize, keep_ratio=True),
    dict(type=RandomCrop, crop_size=(640, 640)),
    dict(type=YOLOXHSVRandomAug),
    dict(type=RandomFlip, prob=0.5),
    dict(type=PackDetInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile, backend_args=backend_args),
    dict(type=Resize, scale=(640, 640), keep_ratio=True),
    dict(type=Pad, size=(640, 640), pad_val=dict(img=(114, 114, 114))),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader.update(dict(batch_size=32, batch_sampler=None, pin_memory=True, dataset=dict(pipeline=train_pipeline)))
val_dataloader.update(dict(batch_size=5, dataset=dict(pipeline=test_pipeline)))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=0.004, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1.0e-5, by_epoch=False, begin=0, end=1000),
    dict(type=CosineAnnealingLR, eta_min=0.0002, begin=6, end=12, T_max=6, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [
    dict(type=EMAHook, ema_type=ExpMomentumEMA, momentum=0.0002, update_buffers=True, priority=49),
    dict(type=PipelineSwitchHook, switch_epoch=10, switch_pipeline=train_pipeline),
]
