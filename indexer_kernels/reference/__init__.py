"""The truth every kernel is tested against: float32 PyTorch, any device, one file per step."""
