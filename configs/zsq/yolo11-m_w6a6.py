_base_ = ['../yolo11/yolo11-m_coco.py', '../_base_/zsq_w6a6.py', '../_base_/yolo11.py']
load_from = 'checkpoints/yolo11m.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
zsq = {{_base_.yolo11}}
