"""As ``quantization.py``, for detectors with BatchNorm."""

_base_ = './quantization.py'
blood_cells = dict(
    synthesis=dict(
        # Black rectangles dominate the BatchNorm statistics of a bright, even smear, and cells lose contrast.
        cutout=None,
        synthesize=dict(iterations=300),
    )
)
