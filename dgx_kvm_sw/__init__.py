"""GPU virtual machines on NVIDIA DGX servers, from one declarative file."""

__version__ = "0.1.0"
