# SPDX-License-Identifier: Apache-2.0
"""Packaging. Links in ``mmzsq/.mim`` add configs, tools and the model index to the wheel; benchmarks stay out."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def version() -> str:
    text = (ROOT / 'mmzsq' / 'version.py').read_text(encoding='utf-8')
    return text.split("__version__ = '")[1].split("'")[0]


def mim_files() -> list[str]:
    # Files are listed explicitly, since '**' patterns do not follow links.
    package = ROOT / 'mmzsq'
    files = [package / '.mim' / 'model-index.yml']
    for folder, kinds in (('configs', ('.py', '.yml', '.md')), ('tools', ('.py', '.sh'))):
        files += [
            package / '.mim' / folder / path.relative_to(ROOT / folder)
            for path in sorted((ROOT / folder).rglob('*'))
            if path.suffix in kinds
        ]
    return [str(path.relative_to(package)) for path in files]


setup(
    name='mmzsq',
    version=version(),
    description='Zero-shot quantization of object detectors: a plugin for MMDetection 3.x',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The mmzsq contributors',
    license='Apache-2.0',
    keywords='quantization zero-shot data-free object-detection mmdetection openvino onnx',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Environment :: Console',
        'Environment :: GPU :: NVIDIA CUDA',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmzsq', 'mmzsq.*']),
    package_data={'mmzsq': ['assets/*', 'report/templates/*', *mim_files()]},
    install_requires=requirements('runtime'),
    extras_require={
        'deploy': requirements('deploy'),
        'lite': [*requirements('stock'), *requirements('mmcv-lite')],
        'onedl': requirements('onedl'),
        'stock': requirements('stock'),
        'tests': requirements('tests'),
    },
    zip_safe=False,
)
