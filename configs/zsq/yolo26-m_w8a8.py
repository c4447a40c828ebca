_base_ = ['../yolo26/yolo26-m_coco.py', '../_base_/zsq_w8a8.py']
load_from = 'checkpoints/yolo26m.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
