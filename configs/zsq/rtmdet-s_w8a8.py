_base_ = [
    'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    '../_base_/zsq_w8a8.py',
    '../_base_/one_stage.py',
]
load_from = (
    'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/'
    'rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'
)
zsq = {{_base_.one_stage}}
