"""From weights to integers and scales. Knows matrices; no checkpoint, no model and no kernel."""
