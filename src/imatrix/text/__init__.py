"""The text: read from its sources, rendered, tokenized and cut into chunks."""
