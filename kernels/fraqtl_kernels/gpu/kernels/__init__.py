"""What Triton compiles; the launchers are in the folder above."""
