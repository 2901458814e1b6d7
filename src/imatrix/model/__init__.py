"""GGUF models as files: headers, parts, architectures, and the cutting out and putting in of heads."""
