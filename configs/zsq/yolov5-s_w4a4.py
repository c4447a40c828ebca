_base_ = ['../yolov5/yolov5-s_coco.py', '../_base_/zsq_w4a4.py']
load_from = 'checkpoints/yolov5s.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
