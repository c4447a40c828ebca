_base_ = ['../yolo26/yolo26-l_coco.py', '../_base_/zsq_w4a8.py']
load_from = 'checkpoints/yolo26l.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
