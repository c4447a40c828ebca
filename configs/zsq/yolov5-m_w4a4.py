_base_ = ['../yolov5/yolov5-m_coco.py', '../_base_/zsq_w4a4.py']
load_from = 'checkpoints/yolov5m.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
