"""How do many inputs of `encode` become vectors without the device waiting for the host?"""
