"""Files, whatever is in them: written whole or not at all, locked, and outputs held against inputs."""
