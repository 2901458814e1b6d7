"""Files, whatever is in them: written whole or not at all, locked, and never over an input."""
