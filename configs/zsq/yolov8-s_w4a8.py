_base_ = ['../yolov8/yolov8-s_coco.py', '../_base_/zsq_w4a8.py']
load_from = 'checkpoints/yolov8s.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
