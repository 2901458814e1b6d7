"""What the tests share: models made on the spot, independent references, programs of the engine."""
