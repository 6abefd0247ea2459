"""Many engines as one: hand-off of prompts between them, who gets which request, roles and scaling."""
