"""SGLang plugin: replaces how DeepSeek Sparse Attention picks its tokens, and nothing else."""

__version__ = "0.1.0"
