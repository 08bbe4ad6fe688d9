"""Speed, measured against other software on the same machine in the same minutes."""
