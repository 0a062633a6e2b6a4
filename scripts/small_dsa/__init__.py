"""A DeepSeek-V3.2 small enough to train in minutes and real enough to serve: its shapes, data, training and export."""
