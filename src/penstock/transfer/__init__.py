"""KV on its way between the memories of ranks: raw bytes, links and words that count. Imports no torch."""
