_base_ = ['../yolov5/yolov5-l_coco.py', '../_base_/zsq_w6a6.py']
load_from = 'checkpoints/yolov5l.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
