"""The two doors to the operating system: files and commands."""
