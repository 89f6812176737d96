"""What a start says and notes, in every process of a server."""
