"""The CPU runtime: NumPy in float32. The embedded default, and the reference every kernel is tested against."""
