"""What a start says, checks and notes, in every process of a server."""
