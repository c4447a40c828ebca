_base_ = ['../yolov8/yolov8-n_coco.py', '../_base_/zsq_w6a6.py']
load_from = 'checkpoints/yolov8n.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
