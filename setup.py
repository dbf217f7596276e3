"""Packaging. ``kernels/`` is installed as ``bertloss_fast.kernels``: ``kernels`` alone is another project's name."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "bertloss_fast" / "__init__.py").read_text(encoding="utf-8")
).group(1)

SENTENCE_TRANSFORMERS = ["sentence-transformers>=5.1,<7", "accelerate>=1.3", "datasets>=2.16"]
TRANSFORMERS = ["transformers>=4.57,<6", "accelerate>=1.3"]
METRICS = ["scikit-learn>=1.5"]
DEMO = [
    *SENTENCE_TRANSFORMERS,
    *METRICS,
    "transformers>=5,<6",
    "scipy>=1.13",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "simple-icd-10-cm==1.5.0",
]
BENCH = ["tqdm>=4.66", "tabulate>=0.9", "matplotlib>=3.9", "pytest>=8", "pytest-benchmark>=5"]
# Other libraries' losses, which the bench has beside ours; it names those that are missing.
PEERS = ["fvcore", "kornia>=0.8", "liger-kernel>=0.5", "monai>=1.4", "timm==1.0.31"]
DEV = [
    *SENTENCE_TRANSFORMERS,
    *TRANSFORMERS,
    *METRICS,
    "torchmetrics>=1.4",
    "lightning>=2.4",
    "pytest>=8",
    "hypothesis>=6.100",
    "mpmath>=1.3",
    "expecttest>=0.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff==0.14.6",
    "mypy==1.18.2",
]

setup(
    name="bertloss-fast",
    version=VERSION,
    description="Fused Triton kernels for the losses of BERT-style classification heads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["bertloss_fast", "bertloss_fast.*"]), "bertloss_fast.kernels"],
    package_dir={"bertloss_fast.kernels": "kernels"},
    package_data={"bertloss_fast": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy"],
    extras_require={
        "sentence-transformers": SENTENCE_TRANSFORMERS,
        "transformers": TRANSFORMERS,
        "metrics": METRICS,
        "demo": DEMO,
        "bench": BENCH,
        "peers": PEERS,
        "dev": DEV,
    },
)
