"""Packaging. Ranges are given here; ``constraints.txt`` pins what is tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "connectomics_neurodiff" / "_version.py").read_text()).group(1)

REQUIRED = [
    "torch>=2.8",
    "numpy>=2,<3",
    "scipy>=1.14",
    "scikit-image>=0.25",
    "h5py>=3.11",
    "yacs>=0.1.8",
    "pyyaml>=6",
    "waterz>=0.10.1,<0.11",
    "numba>=0.61",
    "python-elf>=0.9.2,<0.10",
    "bioimage-cpp>=0.9,<0.10",
    "tqdm>=4.66",
    "psutil>=5.9",
    "connected-components-3d>=3.20",
    "fastremap>=1.15",
    "edt>=2.4",
    "opencv-python-headless>=4.10",
    "lightning>=2.6",
    "tensorboard>=2.17",
    "tifffile>=2024.8",
    "zarr>=3",
    "matplotlib>=3.9",
    "jinja2>=3.1",
]
SEGMENTERS = ["monai>=1.5", "einops>=0.8"]
VIEW = ["neuroglancer>=2.40"]
TEST = [
    *VIEW,
    *SEGMENTERS,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "diffusers>=0.31",
    "scikit-learn>=1.5",
    "ruff>=0.8",
    "mypy>=1.13",
    "types-PyYAML",
    "types-tqdm",
    "types-psutil",
]

setup(
    name="connectomics_neurodiff",
    version=VERSION,
    description="Synthetic labelled EM volumes by conditional diffusion, to train neuron segmenters on few labels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["connectomics_neurodiff", "connectomics_neurodiff.*"]),
    py_modules=["connectomics_neurodiff_finder"],
    package_data={
        "connectomics_neurodiff": ["py.typed", "report/*.html", "report/*.css", "study/*.html", "config/*.yaml"]
    },
    install_requires=REQUIRED,
    extras_require={"segmenters": SEGMENTERS, "view": VIEW, "cuda": ["mamba-ssm>=2.2"], "test": TEST},
    entry_points={"console_scripts": ["neurodiff=connectomics_neurodiff.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
