_base_ = ['../yolov8/yolov8-l_coco.py', '../_base_/zsq_w8a8.py']
load_from = 'checkpoints/yolov8l.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
