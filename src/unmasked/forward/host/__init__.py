"""What does the host do around a forward: its memory, and the time it makes the device wait."""
