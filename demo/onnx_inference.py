# SPDX-License-Identifier: Apache-2.0
"""Detect objects without MMDetection and PyTorch: ``python onnx_inference.py DENSE_DETECTOR.onnx IMAGE``."""

import json
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
metadata = session.get_modelmeta().custom_metadata_map
keys = ('size', 'resize', 'mean', 'std', 'bgr_to_rgb', 'pad_value', 'selection', 'classes')
size, resize, mean, std, to_rgb, pad_value, selection, classes = (json.loads(metadata[key]) for key in keys)
# Sizes are (width, height) from here on.
image = cv2.imread(sys.argv[2])
assert image is not None, f'{sys.argv[2]} is not an image'
shape, frame = np.array(image.shape[1::-1]), np.array(resize['scale'])
letterbox = resize['mode'] == 'letterbox'
factor = min(frame / shape) if letterbox else min(frame.max() / shape.max(), frame.min() / shape.min())
new = frame if resize['mode'] == 'stretch' else np.floor(shape * factor + 0.5).astype(int)
left, top = (frame - new) // 2 if letterbox else (0, 0)
padding = pad_value if resize['pad_value'] is None else (resize['pad_value'] - np.array(mean)) / std
inputs = np.full((*size, 3), padding, np.float32)
pixels = cv2.resize(image, new.tolist())[..., :: -1 if to_rgb else 1]
inputs[top : top + new[1], left : left + new[0]] = (pixels.astype(np.float32) - np.float32(mean)) / np.float32(std)
boxes, scores = (a[0] for a in session.run(['boxes', 'scores'], {'images': inputs.transpose(2, 0, 1)[None]}))
# Select by score and by class-wise non-maximum suppression; without a threshold no box is suppressed.
max_iou = 1 if selection['iou_threshold'] is None else selection['iou_threshold']
locations, labels = np.nonzero(scores > 0.3)
boxes, scores = boxes[locations], scores[locations, labels]
kept: list[int] = []
for index in np.argsort(-scores, kind='stable'):
    rivals = boxes[[k for k in kept if labels[k] == labels[index]]].reshape(-1, 4)
    sides = np.minimum(rivals[:, 2:], boxes[index, 2:]) - np.maximum(rivals[:, :2], boxes[index, :2])
    overlap, areas = sides.clip(0).prod(1), (rivals[:, 2:] - rivals[:, :2]).prod(1)
    if (overlap <= max_iou * (areas + (boxes[index, 2:] - boxes[index, :2]).prod() - overlap)).all():
        kept.append(int(index))
        corners = (boxes[index].reshape(2, 2) - [left, top]) / (new / shape)
        print(classes[labels[index]], f'{scores[index]:.3f}', *corners.clip(0, shape).round(1).ravel())
