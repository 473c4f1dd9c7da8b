"""Builds the guest images of guest-images/ and their packages; see guest-images/README.md."""
