_base_ = ['./yolox-nano_bccd.py', '../_base_/zsq_w8a8.py', './quantization_balanced.py']
load_from = 'work_dirs/yolox-nano_bccd/epoch_64.pth'  # the teacher, trained by its own config
randomness = dict(seed=None)  # None: the seed of the calibration set
zsq = {{_base_.blood_cells}}
