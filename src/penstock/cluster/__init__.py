"""Many engines: who they are, who gets which request, and how KV goes between them."""
