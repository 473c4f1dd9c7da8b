"""An emulated DGX to test on. Imported as `lab`, with tests/ on the path, as `integration` is."""
