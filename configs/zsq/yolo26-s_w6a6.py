_base_ = ['../yolo26/yolo26-s_coco.py', '../_base_/zsq_w6a6.py']
load_from = 'checkpoints/yolo26s.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
