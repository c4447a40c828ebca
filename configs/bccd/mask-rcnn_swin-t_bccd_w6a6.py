_base_ = ['./mask-rcnn_swin-t_bccd.py', '../_base_/zsq_w6a6.py', './quantization_below_8_bits.py']
load_from = 'work_dirs/mask-rcnn_swin-t_bccd/epoch_64.pth'  # the teacher, trained by its own config
randomness = dict(seed=None)  # None: the seed of the calibration set
zsq = {{_base_.blood_cells}}
