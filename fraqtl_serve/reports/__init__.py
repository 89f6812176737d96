"""What is told of KV memory: in responses, in lists, in metrics."""
