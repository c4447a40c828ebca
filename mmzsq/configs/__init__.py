# SPDX-License-Identifier: Apache-2.0
"""Bases of pure-Python configs: ``with read_base(): from mmzsq.configs.zsq_w4a8 import *``.

They equal ``mmzsq::_base_/zsq_*.py``, the bases of text configs.
"""
