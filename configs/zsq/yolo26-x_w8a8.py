_base_ = ['../yolo26/yolo26-x_coco.py', '../_base_/zsq_w8a8.py']
load_from = 'checkpoints/yolo26x.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
