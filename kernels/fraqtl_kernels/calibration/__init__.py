"""What calibration measures on a prompt, and the constants that follow from it."""
