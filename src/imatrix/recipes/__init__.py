"""Which tensor gets which type: measured, chosen, and shown beside the engine's mixtures."""
