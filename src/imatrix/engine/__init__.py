"""The engine as Python has it: settings, models and sessions, here or in a process of its own."""
