r"""Bits of 56 layers, allocated by their sensitivity.

    python tools/analysis_tools/allocate_bits.py configs/zsq/yolov5-n_w4a4.py --budget-gbops 0.53013 \
        --candidates 2 3 4 5 6 8 --out configs/zsq/comparison/yolov5-n_mixed-operations_w4a4.py --work-dir \
        work_dirs/yolov5-n/alloc_mixed-operations_w4a4 --cfg-options \
        zsq.calibration_set.dir=work_dirs/yolov5-n/set_default_seed0/calibration_set \
        zsq.calibration_set.num_images=512

Model size and bit operations 1.041 MB, 0.530 G. With 4 bits in each of these layers 1.091 MB, 0.530 G.
"""

_base_ = ['../yolov5-n_w4a4.py']
zsq = dict(
    calibration_set=dict(dir='work_dirs/yolov5-n/set_default_seed0/calibration_set', num_images=512),
    quantizer=dict(
        overrides={
            'backbone.stage1.0.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage1.1.main_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage1.1.short_conv.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage1.1.final_conv.conv': dict(w_bits=6, a_bits=6),
            'backbone.stage1.1.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage1.1.blocks.0.conv2.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage2.0.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage2.1.main_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage2.1.short_conv.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage2.1.final_conv.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage2.1.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage2.1.blocks.0.conv2.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage2.1.blocks.1.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage2.1.blocks.1.conv2.conv': dict(w_bits=3, a_bits=3),
            'backbone.stage3.0.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage3.1.main_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage3.1.short_conv.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage3.1.final_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage3.1.blocks.0.conv1.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage3.1.blocks.0.conv2.conv': dict(w_bits=3, a_bits=3),
            'backbone.stage3.1.blocks.1.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage3.1.blocks.1.conv2.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage3.1.blocks.2.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage3.1.blocks.2.conv2.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.0.conv': dict(w_bits=3, a_bits=3),
            'backbone.stage4.1.main_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.1.short_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.1.final_conv.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.1.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'backbone.stage4.1.blocks.0.conv2.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.2.conv1.conv': dict(w_bits=4, a_bits=4),
            'backbone.stage4.2.conv2.conv': dict(w_bits=4, a_bits=4),
            'neck.reduce_coarse.conv': dict(w_bits=5, a_bits=5),
            'neck.top_down_middle.main_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_middle.short_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_middle.final_conv.conv': dict(w_bits=5, a_bits=5),
            'neck.top_down_middle.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'neck.top_down_middle.blocks.0.conv2.conv': dict(w_bits=3, a_bits=3),
            'neck.reduce_middle.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_fine.main_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_fine.short_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_fine.final_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.top_down_fine.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'neck.top_down_fine.blocks.0.conv2.conv': dict(w_bits=3, a_bits=3),
            'neck.downsample_fine.conv': dict(w_bits=3, a_bits=3),
            'neck.bottom_up_middle.main_conv.conv': dict(w_bits=5, a_bits=5),
            'neck.bottom_up_middle.short_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.bottom_up_middle.final_conv.conv': dict(w_bits=5, a_bits=5),
            'neck.bottom_up_middle.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'neck.bottom_up_middle.blocks.0.conv2.conv': dict(w_bits=3, a_bits=3),
            'neck.downsample_middle.conv': dict(w_bits=3, a_bits=3),
            'neck.bottom_up_coarse.main_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.bottom_up_coarse.short_conv.conv': dict(w_bits=4, a_bits=4),
            'neck.bottom_up_coarse.final_conv.conv': dict(w_bits=5, a_bits=5),
            'neck.bottom_up_coarse.blocks.0.conv1.conv': dict(w_bits=5, a_bits=5),
            'neck.bottom_up_coarse.blocks.0.conv2.conv': dict(w_bits=4, a_bits=4),
        },
    ),
)
