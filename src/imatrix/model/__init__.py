"""GGUF models as files: headers, parts, what architectures need, and the Hub. It loads no model."""
