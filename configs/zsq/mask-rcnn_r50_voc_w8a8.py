_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/voc0712.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/zsq_w8a8.py',
    '../_base_/two_stage_r50.py',
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=20), mask_head=dict(num_classes=20)))
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
load_from = 'checkpoints/mask-rcnn_r50_voc.pth'  # not published: train it on the masks of VOC
zsq = dict(
    presets=dict(
        default={{_base_.two_stage.presets.default}},
        # The number of images in the paper for VOC (its Table 3).
        paper=dict(quantizer={{_base_.two_stage.presets.paper.quantizer}}, calibration_set=dict(num_images=50)),
    )
)
