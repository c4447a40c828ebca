# SPDX-License-Identifier: Apache-2.0
"""Detectors of the zoo test: MMDetection's configs and the overrides that make each small enough for a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of detectors.

    Attributes:
        name: Name in its paper.
        config: Path of one of its configs below MMDetection's ``configs``.
        size: Side of the images in pixels.
        shrink: Divisor of the channels; 1 if the config does not set all of them.
        changes: Further overrides.
        needs: Settings or packages that a user needs for it, for the table.
        in_ci: Whether it is one of the few families that are checked with every change.
    """

    name: str
    config: str
    size: int = 64
    shrink: int = 4
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ''
    in_ci: bool = False


FEW_LAYERS = {'model.encoder.num_layers': 1, 'model.decoder.num_layers': 2, 'model.num_queries': 30}
RESNET_18 = {'model.backbone.depth': 18, 'model.neck.in_channels': [16, 32, 64, 128]}

DENSE = (
    Family('RetinaNet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
    Family('FCOS', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    Family('ATSS', 'atss/atss_r50_fpn_1x_coco.py'),
    Family('GFL', 'gfl/gfl_r50_fpn_1x_coco.py'),
    Family('TOOD', 'tood/tood_r50_fpn_1x_coco.py', changes=RESNET_18, in_ci=True),
    Family('VFNet', 'vfnet/vfnet_r50_fpn_1x_coco.py'),
    Family('PAA', 'paa/paa_r50_fpn_1x_coco.py', needs='scikit-learn, for its loss'),
    Family('YOLOX', 'yolox/yolox_tiny_8xb8-300e_coco.py', size=128, shrink=1),
    Family('YOLOv3', 'yolo/yolov3_d53_8xb8-ms-608-273e_coco.py', shrink=1),
    Family('YOLOF', 'yolof/yolof_r50-c5_8xb8-1x_coco.py'),
    Family('RTMDet', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py', size=128, shrink=1),
    Family('RTMDet-Ins', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', size=128, shrink=1),
    Family(
        'SSD',
        'ssd/ssd300_coco.py',
        size=300,
        shrink=1,
        changes={'zsq.synthesis.require_feature_prior': False},
        needs='zsq.synthesis.require_feature_prior=False: it has no BatchNorm',
    ),
    Family('CenterNet', 'centernet/centernet_r18_8xb16-crop512-140e_coco.py', shrink=1),
    Family('CenterNet2', 'centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py'),
    Family('FSAF', 'fsaf/fsaf_r50_fpn_1x_coco.py'),
    Family('FoveaBox', 'foveabox/fovea_r50_fpn_4xb4-1x_coco.py'),
    Family('RepPoints', 'reppoints/reppoints-moment_r50_fpn_1x_coco.py'),
    Family('FreeAnchor', 'free_anchor/freeanchor_r50_fpn_1x_coco.py'),
    Family('AutoAssign', 'autoassign/autoassign_r50-caffe_fpn_1x_coco.py'),
    Family('DDOD', 'ddod/ddod_r50_fpn_1x_coco.py'),
    Family('SABL', 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'),
    Family(
        'NAS-FCOS',
        'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
        size=128,
        changes={'model.backbone.norm_cfg.eps': 1e-5},
        needs='model.backbone.norm_cfg.eps above 0: some versions of PyTorch refuse 0',
    ),
)
MASKS = (
    Family('SOLO', 'solo/solo_r50_fpn_1x_coco.py'),
    Family('SOLOv2', 'solov2/solov2_r50_fpn_1x_coco.py'),
    Family('CondInst', 'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'),
    Family('YOLACT', 'yolact/yolact_r50_1xb8-55e_coco.py', changes=RESNET_18, in_ci=True),
)
TRANSFORMERS = (
    Family('DETR', 'detr/detr_r50_8xb2-150e_coco.py', shrink=1, changes=FEW_LAYERS),
    Family('Conditional DETR', 'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py', shrink=1, changes=FEW_LAYERS),
    Family('DAB-DETR', 'dab_detr/dab-detr_r50_8xb2-50e_coco.py', shrink=1, changes=FEW_LAYERS),
    Family('Deformable DETR', 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', shrink=1, changes=FEW_LAYERS),
    Family(
        'Deformable DETR, two-stage',
        'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
        shrink=1,
        changes=FEW_LAYERS,
    ),
    Family('DINO', 'dino/dino-4scale_r50_8xb2-12e_coco.py', shrink=1, changes=FEW_LAYERS),
    Family('DDQ', 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', shrink=1, changes=FEW_LAYERS),
)
SMALL_MASK_QUERIES = {
    'model.panoptic_head.num_queries': 20,
    'model.panoptic_head.pixel_decoder.encoder.num_layers': 1,
    'model.panoptic_head.transformer_decoder.num_layers': 2,
}
MASKFORMER_OF_OBJECTS = {
    'model.panoptic_head.num_stuff_classes': 0,
    'model.panoptic_head.loss_cls.class_weight': [1.0] * 80 + [0.1],
    'model.panoptic_fusion_head.num_stuff_classes': 0,
    'model.test_cfg.panoptic_on': False,
    'model.test_cfg.instance_on': True,
    'val_dataloader.dataset.type': 'CocoDataset',
    'test_dataloader.dataset.type': 'CocoDataset',
    'train_dataloader.dataset.type': 'CocoDataset',
}
MASK_QUERIES = (
    Family(
        'Mask2Former',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        shrink=1,
        changes=SMALL_MASK_QUERIES | {'model.train_cfg.num_points': 1024},
    ),
    Family(
        'MaskFormer',
        'maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
        shrink=1,
        changes=SMALL_MASK_QUERIES | MASKFORMER_OF_OBJECTS,
        needs='no "stuff" categories and `test_cfg.instance_on=True`',
    ),
)
LEARNED_PROPOSALS = {'model.rpn_head.proposal_feature_channel': 64, 'model.rpn_head.num_proposals': 20}
# Small offsets, as a trained detector predicts: MMDetection cannot paste masks on the CPU if no box is in the image.
SMALL_MOVES = {f'model.roi_head.bbox_head.{stage}.bbox_coder.target_stds': [0.02] * 4 for stage in range(6)}

MULTI_STAGE = (
    Family('Faster R-CNN', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    Family('Mask R-CNN', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    Family('Cascade R-CNN', 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', changes=RESNET_18, in_ci=True),
    Family('Cascade Mask R-CNN', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'),
    Family('Dynamic R-CNN', 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py'),
    Family('Libra R-CNN', 'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py'),
    Family('Grid R-CNN', 'grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py'),
    Family('SABL Cascade R-CNN', 'sabl/sabl-cascade-rcnn_r50_fpn_1x_coco.py', changes=RESNET_18),
    Family('CrowdDet', 'crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py'),
    Family('Double-Head R-CNN', 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'),
    Family('HTC', 'htc/htc_r50_fpn_1x_coco.py'),
    Family('PointRend', 'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py'),
    Family('Mask Scoring R-CNN', 'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py'),
    Family('SCNet', 'scnet/scnet_r50_fpn_1x_coco.py'),
    Family(
        'PISA',
        'pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py',
        # Its loss needs a negative box in every image.
        changes={'model.train_cfg.rpn_proposal.max_per_img': 300},
    ),
    Family('Cascade RPN', 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    Family('Sparse R-CNN', 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', changes=LEARNED_PROPOSALS),
    Family('QueryInst', 'queryinst/queryinst_r50_fpn_1x_coco.py', changes=LEARNED_PROPOSALS | SMALL_MOVES),
)
NO_WEIGHTS = {'model.backbone.init_cfg': None}
BACKBONES = (
    Family('ResNeXt', 'faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py'),
    Family('RegNet', 'regnet/faster-rcnn_regnetx-400MF_fpn_ms-3x_coco.py', shrink=1),
    Family('Res2Net', 'res2net/faster-rcnn_res2net-101_fpn_2x_coco.py'),
    Family('ResNeSt', 'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py'),
    Family('HRNet', 'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py'),
    Family(
        'EfficientNet',
        'efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
        size=128,
        shrink=1,
        # Without training, its features are so large that all boxes would leave the image.
        changes={
            'model.backbone.arch': 'b0',
            'model.neck.in_channels': [40, 112, 320],
            'model.bbox_head.bbox_coder.target_stds': [1e-6] * 4,
        },
    ),
    Family('PVT', 'pvt/retinanet_pvt-t_fpn_1x_coco.py', shrink=1, changes=NO_WEIGHTS),
    Family('PVTv2', 'pvt/retinanet_pvtv2-b0_fpn_1x_coco.py', shrink=1, changes=NO_WEIGHTS),
    Family('Swin', 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    Family('Deformable convolution', 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py', size=128),
    Family('Deformable convolution v2', 'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py'),
    Family(
        'Weight standardization',
        'gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py',
        shrink=1,
        changes={'zsq.synthesis.require_feature_prior': False},
        needs='zsq.synthesis.require_feature_prior=False: it has no BatchNorm',
    ),
)
COMBINATIONS = (
    Family('PAFPN', 'pafpn/faster-rcnn_r50_pafpn_1x_coco.py', changes=RESNET_18),
    Family('NAS-FPN', 'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py', size=128, changes=RESNET_18),
    Family(
        'Guided anchoring',
        'guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py',
        # An untrained head expects objects nowhere.
        changes={'model.bbox_head.loc_filter_thr': 0.0},
    ),
    Family('GHM', 'ghm/retinanet_r50_fpn_ghm-1x_coco.py', changes=RESNET_18),
    Family(
        'Gradient checkpointing', 'retinanet/retinanet_r50_fpn_1x_coco.py', changes={'model.backbone.with_cp': True}
    ),
)
"""Other necks, heads and settings of detectors above."""
FAMILIES = (*DENSE, *MASKS, *TRANSFORMERS, *MASK_QUERIES, *MULTI_STAGE, *BACKBONES, *COMBINATIONS)
FULL_SIZE = (
    Family('VFNet R50', 'vfnet/vfnet_r50_fpn_1x_coco.py', size=640, shrink=1),
    Family('TOOD R50', 'tood/tood_r50_fpn_1x_coco.py', size=640, shrink=1),
    Family('Cascade Mask R-CNN R50', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', size=640, shrink=1),
    Family('DINO R50', 'dino/dino-4scale_r50_8xb2-12e_coco.py', size=640, shrink=1),
    Family('YOLOX-s', 'yolox/yolox_s_8xb8-300e_coco.py', size=640, shrink=1),
)
"""Detectors that are also checked as they are, on a GPU."""
