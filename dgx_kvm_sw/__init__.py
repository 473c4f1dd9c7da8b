"""GPU virtual machines on NVIDIA DGX servers, from one declarative file."""
