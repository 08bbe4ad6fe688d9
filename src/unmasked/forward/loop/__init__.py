"""How does `encode` turn many inputs into vectors without the device waiting for the host?"""
