# SPDX-License-Identifier: Apache-2.0
"""Draw the same images of several calibration sets below each other, with their labels.

    python tools/analysis_tools/compare_galleries.py adaptive=work_dirs/a/calibration_set \
        tile=work_dirs/b/calibration_set --out samplers.png

Images are selected by index, by default the first eight, so that the selection favors no set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from label_statistics import named_path

from mmzsq.errors import UserError
from mmzsq.visualization import save_side_by_side


def main() -> None:
    """Parse the command line, read, draw."""
    options = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    options.add_argument('sets', nargs='+', metavar='SET', help='[NAME=]folder of a complete calibration set')
    options.add_argument('--out', type=Path, required=True, help='PNG file to write')
    options.add_argument(
        '--indices', type=int, nargs='+', default=list(range(8)), help='indices of the images (default: 0 to 7)'
    )
    args = options.parse_args()
    try:
        save_side_by_side(args.out, dict(named_path(text) for text in args.sets), args.indices)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    main()
