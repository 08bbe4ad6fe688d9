"""The stages that make an encoder of a decoder: MNTP, SimCSE, supervised."""
