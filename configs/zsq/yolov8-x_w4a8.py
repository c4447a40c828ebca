_base_ = ['../yolov8/yolov8-x_coco.py', '../_base_/zsq_w4a8.py']
load_from = 'checkpoints/yolov8x.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
