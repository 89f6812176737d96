"""What requests hold: counted in the engine's process, told to the API server."""
