"""What Numba compiles; the launchers are in the folder above."""
