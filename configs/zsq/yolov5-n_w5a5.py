_base_ = ['../yolov5/yolov5-n_coco.py', '../_base_/zsq_w5a5.py']
load_from = 'checkpoints/yolov5n.safetensors'  # written by tools/model_converters/ultralytics_to_mmzsq.py
