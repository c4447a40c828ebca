_base_ = [
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
    '../_base_/zsq_w8a8.py',
    '../_base_/one_stage.py',
]
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_s_8x8_300e_coco/'
    'yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth'
)
zsq = {{_base_.one_stage}}
