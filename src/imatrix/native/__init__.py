"""The compiled parts: the engine and the quantizer, and their types for type checkers."""
